"""Memory of ranks that share a base: the proportional set size (PSS) of all processes, shared pages counted once.

    python benchmarks/bench_ranks.py [SHAPE]        default: llama-3b; ranks 1 and 2

Weights are random, made on the spot in bitsandbytes' format and removed afterwards (--keep leaves them).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from common import docstring_data, write_result
from random_model import SHAPES, model_folder

WORK = Path("bench-work")
OUTPUT = Path(__file__).parent / "results" / "ranks.json"
SETTINGS = ["train.resume=never", "train.gradient_checkpointing=true", "data.max_seq_len=64", "data.mask_prompt=false"]
EVERY = 0.25


def pss(process: psutil.Process) -> dict[str, int]:
    """Bytes of a process by kind; of a page that n processes share, a n-th."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def trainers(pid: int) -> list[psutil.Process]:
    """The training processes among `pid` and its children."""
    agent = psutil.Process(pid)
    return [p for p in (agent, *agent.children()) if "torch.distributed.run" not in p.cmdline()]


def run(model: Path, ranks: int, steps: int) -> dict[str, Any]:
    """The fullest moment of a short run: all its processes together."""
    train, _ = docstring_data(WORK)
    output = WORK / "ranks-run"
    shutil.rmtree(output, ignore_errors=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "halfbyte", "train", "--model", str(model), "--data", str(train), "--json",
               "--output", str(output), "--steps", str(steps)]  # fmt: skip
    for setting in SETTINGS:
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    most: dict[str, int] = {"Pss": 0}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                parts = [pss(each) for each in trainers(process.pid)]
            except (OSError, psutil.Error):  # one has just ended
                parts = []
            now = {key: sum(part.get(key, 0) for part in parts) for key in ("Rss", "Pss", "Pss_Anon", "Pss_File")}
            most = max(most, now, key=lambda each: each["Pss"])
            time.sleep(EVERY)
        assert process.stdout is not None
        result = json.loads(process.stdout.read().decode().splitlines()[-1])
    if process.returncode:
        sys.exit(f"exit code {process.returncode}")
    return {"ranks": ranks, **most, "train_loss": result["train_loss"], "peak_rss_of_rank_0": result["peak_memory"],
            "planned_of_each": result["predicted_peak_memory"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="llama-3b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    model = model_folder(WORK / options.shape, options.shape)
    runs = [run(model, ranks, options.steps) for ranks in (1, 2)]
    ratio = runs[1]["Pss"] / runs[0]["Pss"]
    write_result(OUTPUT, {"memory": {"shape": options.shape, "ratio": ratio, "runs": runs}})
    print(json.dumps({"ratio": ratio, "runs": runs}, indent=1))
    if not options.keep:
        shutil.rmtree(model)


if __name__ == "__main__":
    main()
