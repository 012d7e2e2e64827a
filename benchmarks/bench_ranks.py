"""Ranks of one machine: the memory they take together, and whether killing them changes anything.

    python benchmarks/bench_ranks.py memory [SHAPE]     proportional set size (PSS: a page that n share counts 1/n) of
                                                        one process and of two ranks; default: llama-8b
    python benchmarks/bench_ranks.py sharding [SHAPE]   the same of 1, 2 and 4 ranks with train.sharding=full; llama-1b
    python benchmarks/bench_ranks.py kills [COUNT]      tests/faults/rank_kills.py on a tiny model; default: 20

Each leaves its part of results/ranks.json. One process maps the base too: its PSS is that of a base it has read.
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
import torch
from common import last_json, provenance
from random_model import SHAPES, model_folder, write_model
from texts import docstring_data
from transformers import AutoConfig

WORK = Path("bench-work")
OUTPUT = Path(__file__).parent / "results" / "ranks.json"
SETTINGS = ["train.resume=never", "train.gradient_checkpointing=true", "data.max_seq_len=64", "data.mask_prompt=false"]
EVERY = 0.25
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
KILLED = {
    "quant__compute_dtype": "float32", "lora__r": 4, "lora__dropout": 0.1, "optim__lr": 5e-3, "train__steps": 400,
    "train__micro_batch_size": 2, "data__max_seq_len": 96, "train__save_every": 15, "train__keep": 2,
}  # fmt: skip


def pss(process: psutil.Process) -> dict[str, int]:
    """Bytes of a process by kind; of a page that n processes share, a n-th."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def trainers(pid: int) -> list[psutil.Process]:
    """The training processes among `pid` and its children."""
    agent = psutil.Process(pid)
    return [p for p in (agent, *agent.children()) if "torch.distributed.run" not in p.cmdline()]


def run(model: Path, ranks: int, *settings: str) -> dict[str, Any]:
    """The fullest moment of a step: all processes together."""
    train, _ = docstring_data(WORK)
    output = WORK / "ranks-run"
    shutil.rmtree(output, ignore_errors=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [
        sys.executable, *launch, "-m", "halfbyte", "train", "--model", str(model), "--data", str(train), "--json",
        "--output", str(output), "--steps", "1",
    ]  # fmt: skip
    for setting in (*SETTINGS, *settings):
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
    adapter = (output / "adapter" / "adapter_model.safetensors").stat().st_size
    return {
        "ranks": ranks, **most, "adapter": adapter, "train_loss": result["train_loss"],
        "peak_rss_of_rank_0": result["peak_memory"], "planned_of_each": result["predicted_peak_memory"],
    }  # fmt: skip


def memory(shape: str, keep: bool) -> dict[str, Any]:
    """One process, then two ranks."""
    model = model_folder(WORK / shape, shape)
    runs = [run(model, 1, "memory.weights=mmap"), run(model, 2)]
    if not keep:
        shutil.rmtree(model)
    one, two = (each["Pss"] for each in runs)
    own = 4 * runs[0]["adapter"]  # the second rank's parameters, gradients and two moments
    return {"shape": shape, "ratio": two / one, "ratio_without_its_adapter": (two - own) / one, "runs": runs}


def sharding(shape: str, keep: bool) -> dict[str, Any]:
    """One process with the base in its memory, then ranks with a part of it each."""
    model = model_folder(WORK / shape, shape)
    runs = [run(model, 1), *(run(model, ranks, "train.sharding=full") for ranks in (2, 4))]
    if not keep:
        shutil.rmtree(model)
    return {"shape": shape, "runs": runs}


def kills(count: int) -> dict[str, Any]:
    """What rank_kills.py found; it ends with an error if a byte differs."""
    model = WORK / "tiny"
    shutil.rmtree(model, ignore_errors=True)
    write_model(model, AutoConfig.for_model(**TINY, dtype=torch.bfloat16), in_4_bits=False)
    train, _ = docstring_data(WORK, num_train=200)
    shutil.rmtree(WORK / "kills", ignore_errors=True)
    settings = KILLED | {"model__path": str(model), "data__train": str(train), "train__output": str(WORK / "kills")}
    file = WORK / "kills.json"
    file.write_text(json.dumps(settings))
    script = Path(__file__).parents[1] / "tests" / "faults" / "rank_kills.py"
    return last_json([sys.executable, str(script), str(file), str(count), "0"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, shape in (("memory", "llama-8b"), ("sharding", "llama-1b")):
        sizes = tasks.add_parser(task)
        sizes.add_argument("shape", nargs="?", choices=SHAPES, default=shape)
        sizes.add_argument("--keep", action="store_true", help="leave the model in bench-work/")
    tasks.add_parser("kills").add_argument("count", nargs="?", type=int, default=20)
    options = parser.parse_args()
    if options.task == "kills":
        found = kills(options.count)
    else:
        found = (memory if options.task == "memory" else sharding)(options.shape, options.keep)
    known = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    OUTPUT.write_text(json.dumps({**known, options.task: {**provenance(), **found}}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
