"""`halfbyte train` on a GPU, beside bitsandbytes + PEFT where these can be imported: speed, memory, losses.

    python benchmarks/bench_gpu_train.py [--shapes llama-1b,llama-135m] [--batch 8] [--tokens 1024] [--steps 8]

Models of random 4-bit weights, made on the spot with a tokenizer of bytes, so that nothing is fetched; random text in
samples of a pack's length, every token learned. A step is BATCH x TOKENS tokens for all. Each run has a process of its
own; the first three steps, in which kernels are compiled, do not count. halfbyte runs once more with a tight budget,
to see that the plan and the cap hold.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import halfbyte, last_json, write_result
from random_model import model_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
WARM_UP = 3
MARGIN = 1.02
"""Of the least that a plan asks for, what the tight run is given."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def text_file(path: Path, samples: int, tokens: int) -> Path:
    """Samples of `tokens` tokens each, their end token included."""
    letters = random.Random(0)
    rows = ("".join(letters.choices(string.ascii_letters, k=tokens - 1)) for _ in range(samples))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def run_halfbyte(folder: Path, data: Path, output: Path, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """A run's figures; `failed` and its last words if it ended badly."""
    arguments = [
        "train", "--model", str(folder), "--data", str(data), "--output", str(output), "--device", "cuda",
        "--steps", str(options.steps), "--resume", "never", "--set", f"data.max_seq_len={options.tokens}",
        "--set", f"train.micro_batch_size={options.batch}", "--set", "data.format=text",
        "--set", "optim.lr=1e-4", "--set", "quant.scale=absmax", *more,
    ]  # fmt: skip
    started = time.perf_counter()
    try:
        result = halfbyte(*arguments, stderr=subprocess.PIPE)
    except subprocess.CalledProcessError as error:
        return {"failed": error.returncode, "said": error.stderr.strip().splitlines()[-3:]}
    steps = [line for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
             if line["event"] == "step"]  # fmt: skip
    counted = steps[WARM_UP:]
    return {
        "seconds_per_step": statistics.median(step["seconds"] for step in counted),
        "tokens_per_s": statistics.median(step["tokens"] / step["seconds"] for step in counted),
        "losses": [steps[0]["loss"], steps[-1]["loss"]], "tokens": steps[-1]["tokens"],
        "peak_memory": result["peak_memory"], "taken_memory": result["taken_memory"],
        "predicted_peak_memory": result["predicted_peak_memory"], "seconds": time.perf_counter() - started,
    }  # fmt: skip


def run_peer(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """bitsandbytes + PEFT's figures."""
    counts = (options.batch, options.tokens, options.steps, 0)
    command = [sys.executable, "-W", "ignore", str(HERE / "gpu_peer.py"), str(folder), *map(str, counts)]
    try:
        return last_json(command, stderr=subprocess.PIPE)
    except subprocess.CalledProcessError as error:
        return {"failed": error.returncode, "said": error.stderr.strip().splitlines()[-3:]}


def tight(folder: Path, data: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The smallest budget that a plan says would do, and the run in it."""
    made = halfbyte("plan", "--model", str(folder), "--device", "cuda", "--memory", "100GB",
                    "--set", f"data.max_seq_len={options.tokens}", "--set",
                    f"train.micro_batch_size={options.batch}")  # fmt: skip
    budget = int(MARGIN * made["smallest_memory"])
    return {"budget": budget} | run_halfbyte(folder, data, work / "tight", options, "--memory", str(budget))


def case(shape: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of a shape."""
    folder = model_folder(work / shape, shape, tokenizer=byte_tokenizer())
    data = text_file(work / "text.jsonl", options.batch * options.steps, options.tokens)
    figures = {"halfbyte": run_halfbyte(folder, data, work / f"{shape}-run", options)}
    if find_spec("bitsandbytes") is not None:
        figures["bitsandbytes + PEFT"] = run_peer(folder, options)
    figures["halfbyte, tight"] = tight(folder, data, work, options)
    return figures


def main() -> int:
    """Measure, print, store. 4: no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-1b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu-train.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu_train: no CUDA device (or a torch without CUDA); nothing was run", file=sys.stderr)
        return 4
    options.work.mkdir(parents=True, exist_ok=True)
    figures = {}
    for shape in options.shapes.split(","):
        figures[shape] = case(shape, options.work, options)
        print(json.dumps({shape: figures[shape]}, indent=1), flush=True)
    settings = {"batch": options.batch, "tokens": options.tokens, "steps": options.steps}
    write_result(options.output, {"gpu": torch.cuda.get_device_name(), **settings, "figures": figures})
    print(f"written to {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
