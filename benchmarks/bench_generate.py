"""Generation at batch 1: halfbyte against transformers fp32, bitsandbytes NF4 and llama.cpp Q4_0, on one model.

"halfbyte" has the head in bfloat16 as the file does, "halfbyte-int8" in int8 (quant.embeddings), llama.cpp in Q8_0;
"halfbyte-bf16" computes prompts in bfloat16, all others in float32 (bitsandbytes repacks for bfloat16 by itself).

usage: bench_generate.py [--threads N] [--rounds N] [--model smollm2|llama-1b] [--output FILE]

Each stack runs in a process of its own (generate_peer.py), in turn, round after round; figures are medians over the
rounds. A run reads a prompt of 512 tokens (prompt tokens/s), then writes 64 tokens after a prompt of 32 (tokens/s),
greedily and past any end token. llama.cpp takes part where `benchmarks/peers.py` has made its environment, or another
Python that has xllamacpp is given. `llama-1b` has the shape of Llama-3.2-1B and random weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import generate_models
from common import last_json, write_result
from peers import peer_python

PEER = Path(__file__).parent / "generate_peer.py"
LLAMA = Path(__file__).parent / "generate_llama.py"
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=generate_models.MODELS, default="smollm2")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--stacks", default="halfbyte,halfbyte-int8,halfbyte-bf16,transformers,bitsandbytes,llama.cpp")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    folder = generate_models.folder(args.model, args.work)
    commands = {
        stack: [sys.executable, str(PEER), stack, str(folder), str(args.threads)]
        for stack in args.stacks.split(",") if stack != "llama.cpp"
    }  # fmt: skip
    llama_python = args.llama_python or peer_python(args.work)
    if llama_python and "llama.cpp" in args.stacks:
        gguf = generate_models.q4_0(folder, args.work / f"{args.model}-q4_0.gguf")
        commands["llama.cpp"] = [str(llama_python), str(LLAMA), str(gguf), str(args.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    rounds: dict[str, list[dict[str, Any]]] = {stack: [] for stack in commands}
    cannot: dict[str, str] = {} if "llama.cpp" in commands else {"llama.cpp": "benchmarks/peers.py has not been run"}
    for number in range(args.rounds):
        for stack, command in commands.items():
            if stack in cannot:
                continue
            try:
                row = last_json(command, env=environment)
            except CalledProcessError as error:
                cannot[stack] = f"round {number + 1}: exit status {error.returncode}"
                continue
            rounds[stack].append(row)
            print(f"round {number + 1} {stack:13} {row}", flush=True)
    table = {
        stack: {key: statistics.median(row[key] for row in rows) for key in ("prompt_tokens_per_s", "tokens_per_s")}
        for stack, rows in rounds.items() if rows
    }  # fmt: skip
    print(f"\n{'':14}{'prompt tokens/s':>16}{'tokens/s':>12}")
    for stack, row in table.items():
        print(f"{stack:14}{row['prompt_tokens_per_s']:>16.0f}{row['tokens_per_s']:>12.1f}")
    for stack, why in cannot.items():
        print(f"{stack}: {why}")
    output = args.output or RESULTS / f"generate-{args.model}-{args.threads}.json"
    write_result(output, {
        "model": args.model, "generate_threads": args.threads, "load": os.getloadavg(), "medians": table,
        "rounds": rounds, "cannot": cannot,
    })  # fmt: skip


if __name__ == "__main__":
    main()
