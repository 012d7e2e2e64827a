"""Times the quick start of docs/index.md as a stranger meets it: a fresh clone, an environment and samples of its own.

usage: newcomer.py [RESULT.json]      default: benchmarks/results/newcomer.json; needs git and a package index

The commands are those of the page. pip's cache is not used. The samples are 500 questions about Python's standard
library, from its docstrings.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from halfbyte.cli.demo_data import write_docstring_qa

ROOT = Path(__file__).parent.parent
SAMPLES = 500


def commands() -> list[str]:
    """The three of the quick start."""
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "scripts/venv" in block]
    return block.splitlines()


def run(command: str, folder: Path) -> float:
    """Seconds that `command` takes in `folder`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "HF_", "VIRTUAL_"))}
    started = time.perf_counter()
    subprocess.run(["bash", "-c", command], cwd=folder, check=True, env=environment | {"PIP_NO_CACHE_DIR": "1"})
    return time.perf_counter() - started


def main() -> None:
    """See the module."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "newcomer.json"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        clone = Path(place) / "halfbyte"
        seconds = {"git clone": run(f"git clone --quiet {ROOT} {clone}", Path(place))}
        write_docstring_qa(clone / "mine.jsonl", Path(place) / "rest.jsonl", num_train=SAMPLES, num_held_out=1)
        for command in commands():
            seconds[command] = run(command, clone)
        steps = [
            json.loads(line) for line in (clone / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        losses = [step["loss"] for step in steps if step.get("event") == "step"]
        adapter = (clone / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    output.write_text(json.dumps({
        "samples": SAMPLES, "seconds": seconds, "total": sum(seconds.values()), "steps": len(losses),
        "first_loss": losses[0], "last_loss": losses[-1], "adapter_bytes": adapter, "cores": os.cpu_count(),
        "load_before": load, "load_after": os.getloadavg()[0], "machine": platform.platform(),
    }, indent=1) + "\n", encoding="utf-8")  # fmt: skip
    print(output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
