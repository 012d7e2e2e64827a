"""A whole LoRA training step beside the usual stacks: tokens/s and peak memory, each stack in a process of its own.

    python benchmarks/bench_step.py [--model smollm2|llama-1b] [--stacks a,b,...] [--rounds 3] [--steps 3]

The stacks take turns, round after round; figures are medians over the rounds. `llama-1b` has the shape of Llama-3.2-1B
and random weights: nothing but speed and memory is looked at. `fork` (bitsandbytes-cpu-fork) and `torchao` take part
where `benchmarks/peers.py` has made their environment; a stack that fails is left out of the later rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import torch
from common import last_json, llama_1b_folder, smollm2_folder, write_result
from peers import peer_python
from rich.console import Console
from rich.table import Table

STACKS = ["halfbyte-fp32", "halfbyte-bf16", "peft-fp32", "peft-bf16", "bitsandbytes-fp32", "bitsandbytes-bf16"]
PEERS = ["fork-fp32", "torchao-fp32"]
"""In the environment of `peers.py`."""
DEFAULTS = {
    "smollm2": STACKS + PEERS + [f"{stack}-checkpoint" for stack in STACKS],
    "llama-1b": ["halfbyte-fp32", "halfbyte-bf16", "peft-fp32", "bitsandbytes-fp32", "fork-fp32"],
}
"""torchao would take six minutes to quantize the 1B shape."""


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "llama-1b"), default="smollm2")
    parser.add_argument("--stacks", help="comma separated")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = {"smollm2": smollm2_folder, "llama-1b": llama_1b_folder}[options.model](options.work / options.model)
    stacks = options.stacks.split(",") if options.stacks else DEFAULTS[options.model]
    peers = peer_python(options.work)
    cannot = {stack: "benchmarks/peers.py has not been run" for stack in stacks if stack in PEERS and peers is None}
    runs: dict[str, list[dict[str, Any]]] = {stack: [] for stack in stacks if stack not in cannot}
    script = str(Path(__file__).with_name("step.py"))
    for number in range(options.rounds):
        for stack, results in runs.items():
            if len(results) < number:
                continue
            python = str(peers if stack in PEERS else sys.executable)
            shape = [str(n) for n in (options.batch, options.tokens, options.steps)]
            try:
                results.append(last_json([python, "-W", "ignore", script, stack, str(folder), *shape]))
            except CalledProcessError as error:
                cannot[stack] = f"round {number + 1}: exit status {error.returncode}"
                continue
            print(f"round {number + 1}: {stack} {results[-1]['tokens_per_s']:.0f} tokens/s", file=sys.stderr)
    figures = {
        stack: {
            "tokens_per_s": statistics.median(r["tokens_per_s"] for r in results),
            "peak_memory": statistics.median(r["peak_memory"] for r in results),
            "losses": results[0]["losses"],
        }
        for stack, results in runs.items() if results
    }  # fmt: skip
    table = Table("stack", "tokens/s", "peak memory", "first and last loss", title=f"{options.model}, {folder}")
    for stack, row in figures.items():
        table.add_row(
            stack, f"{row['tokens_per_s']:.0f}", f"{row['peak_memory'] / 1e9:.2f} GB",
            f"{row['losses'][0]:.4f} {row['losses'][-1]:.4f}",
        )  # fmt: skip
    Console(width=110).print(table)
    for stack, why in cannot.items():
        print(f"{stack}: {why}")
    where = options.output or Path(__file__).parent / "results" / f"step-{options.model}.json"
    write_result(where, {
        "model": options.model, "batch": options.batch, "tokens": options.tokens, "rounds": options.rounds,
        "threads": torch.get_num_threads(), "stacks": figures, "cannot": cannot,
    })  # fmt: skip


if __name__ == "__main__":
    main()
