"""Does a memory budget hold? Training inside a control group whose limit is the budget; planned beside measured peak.

    python benchmarks/bench_memory.py [--only llama-135m,...] [--work bench-work/memory] [--output FILE]

As root: it makes a memory control group (version 1 or 2) for each run, sets its limit to the budget, and starts
`halfbyte train --memory BUDGET` in it. Models have the shapes named and random weights, made on the spot: in bfloat16,
or from 1B parameters on in 4 bits: only memory and time are looked at. Every token is learned, packs are full.
Measured is the most resident memory the process ever had (VmHWM), which counts the libraries' pages as well.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgroup import run_limited
from common import write_result
from random_model import model_folder
from rich.console import Console
from rich.table import Table
from tables import budgets

from halfbyte.dtypes import parse_bytes


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    tokens: int
    batch: int
    rank: int
    budget: str
    settings: tuple[str, ...] = ()
    evaluates: bool = False
    """Held-out loss before and after, and answers."""


FLOAT32 = "quant.compute_dtype=float32"
CASES = [
    Case("llama-135m", 128, 1, 16, "1GB", evaluates=True),
    Case("llama-135m", 512, 2, 16, "1.5GB", (FLOAT32,)),
    Case("llama-135m", 512, 4, 64, "1.2GB"),
    Case("llama-135m", 1024, 1, 8, "1.1GB", (FLOAT32,), evaluates=True),
    Case("llama-135m", 2048, 1, 16, "2GB"),
    Case("llama-135m", 8192, 1, 16, "2GB"),
    Case("qwen3-360m", 512, 1, 16, "1.4GB"),
    Case("qwen3-360m", 1024, 2, 32, "1.5GB", (FLOAT32, "optim.bits=8")),
    Case("qwen2-500m", 256, 2, 16, "1.8GB", evaluates=True),
    Case("qwen2-500m", 2048, 1, 64, "2GB"),
    Case("gemma3-1b", 512, 1, 16, "2.2GB"),
    Case("gemma3-1b", 1024, 1, 16, "2GB", (FLOAT32,)),
    Case("llama-1b", 128, 1, 64, "2.5GB"),
    Case("llama-1b", 512, 2, 16, "2.5GB", evaluates=True),
    Case("llama-1b", 2048, 1, 16, "1.9GB"),
    Case("llama-1b", 4096, 1, 8, "3GB"),
    Case("llama-3b", 256, 1, 16, "4GB"),
    Case("llama-3b", 1024, 1, 32, "2.5GB"),
    Case("llama-8b", 128, 1, 8, "7.8GB"),
    Case("llama-8b", 512, 1, 16, "5GB"),
]


def text_file(path: Path, tokens: int) -> Path:
    """Running text, more than `tokens` tokens a line: with truncation every pack is full."""
    words = ["memory", "budget", "plan", "layer", "token", "head", "norm", "gate", "query", "key", "value", "page"]
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=tokens + 8))}) for _ in range(16)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(case: Case, work: Path) -> dict[str, Any]:
    """Train two steps of `case` under its limit."""
    size = float(case.model.rpartition("-")[2].rstrip("mb")) * (1e6 if case.model.endswith("m") else 1e9)
    folder = model_folder(work / "models" / case.model, case.model, in_4_bits=size >= 1e9)
    data = text_file(work / f"text-{case.tokens}.jsonl", case.tokens)
    settings = (
        f"data.max_seq_len={case.tokens}", "data.on_long=truncate", "data.format=text", f"lora.r={case.rank}",
        f"train.micro_batch_size={case.batch}", *([f"data.eval={data}"] if case.evaluates else []), *case.settings,
    )  # fmt: skip
    command = [
        sys.executable, "-m", "halfbyte", "train", "--model", str(folder), "--data", str(data), "--json",
        "--output", str(work / "run"), "--steps", "2", "--resume", "never", "--memory", case.budget,
    ]  # fmt: skip
    command += [part for setting in settings for part in ("--set", setting)]
    started = time.perf_counter()
    with (work / "notes.txt").open("w+") as notes:
        done, kills = run_limited(parse_bytes(case.budget), command, stderr=notes)
        notes.seek(0)
        said = notes.read().strip().splitlines()
    dtype = next((line.split()[2].rstrip(":") for line in said if line.strip().startswith("compute dtype")), "")
    row: dict[str, Any] = {**vars(case), "compute_dtype": dtype, "exit": done.returncode, "oom_kills": kills,
                           "seconds": time.perf_counter() - started}  # fmt: skip
    if done.returncode:
        return row | {"error": said[-1:]}
    result = json.loads(done.stdout.strip().splitlines()[-1])
    changes = [line.strip() for line in said if "to fit:" in line]
    return row | {"planned": result["predicted_peak_memory"], "measured": result["peak_memory"], "changes": changes,
                  "tokens_per_s": result["tokens_per_s"]}  # fmt: skip


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of shapes, with commas")
    parser.add_argument("--work", type=Path, default=Path("bench-work/memory"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options = parser.parse_args()
    wanted = set(filter(None, options.only.split(",")))
    rows = []
    for case in CASES:
        if not wanted or case.model in wanted:
            rows.append(run(case, options.work))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            write_result(options.output, {"rows": rows})
    table = Table(*budgets({"rows": rows})[0])
    for row in budgets({"rows": rows})[1:]:
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
