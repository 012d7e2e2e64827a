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
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import write_result
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from halfbyte.checkpoint import write_folder
from halfbyte.checkpoint.shard_writer import write_shards
from halfbyte.cli.demo import smollm2_path
from halfbyte.dtypes import format_bytes, parse_bytes
from halfbyte.model.source import load_tokenizer
from halfbyte.quant import quantize

SHAPES: dict[str, dict[str, Any]] = {
    "llama-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                   "num_key_value_heads": 3, "vocab_size": 49152},
    "qwen3-360m": {"model_type": "qwen3", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 24,
                   "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49152},
    "qwen2-500m": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                   "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
    "gemma3-1b": {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
                  "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 131072},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
    "llama-3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    tokens: int
    batch: int
    rank: int
    budget: str
    settings: tuple[str, ...] = ()


CASES = [
    Case("llama-135m", 128, 1, 16, "1GB"),
    Case("llama-135m", 512, 2, 16, "1.5GB", ("quant.compute_dtype=float32",)),
    Case("llama-135m", 512, 4, 64, "1.2GB"),
    Case("llama-135m", 1024, 1, 8, "1.1GB", ("quant.compute_dtype=float32",)),
    Case("llama-135m", 2048, 1, 16, "2GB"),
    Case("llama-135m", 8192, 1, 16, "2GB"),
    Case("qwen3-360m", 512, 1, 16, "1.4GB"),
    Case("qwen3-360m", 1024, 2, 32, "1.5GB", ("quant.compute_dtype=float32", "optim.bits=8")),
    Case("qwen2-500m", 256, 2, 16, "1.6GB"),
    Case("qwen2-500m", 2048, 1, 64, "2GB"),
    Case("gemma3-1b", 512, 1, 16, "2.2GB"),
    Case("gemma3-1b", 1024, 1, 16, "2GB", ("quant.compute_dtype=float32",)),
    Case("llama-1b", 128, 1, 64, "2.5GB"),
    Case("llama-1b", 512, 2, 16, "2.5GB"),
    Case("llama-1b", 2048, 1, 16, "2.5GB"),
    Case("llama-1b", 8192, 1, 8, "3.5GB"),
    Case("llama-3b", 256, 1, 16, "4GB"),
    Case("llama-3b", 1024, 1, 32, "4GB"),
    Case("llama-8b", 128, 1, 8, "7.8GB"),
    Case("llama-8b", 512, 1, 16, "8GB"),
]


def model_folder(folder: Path, name: str) -> Path:
    """A model of the shape `name` with random weights and SmolLM2's tokenizer."""
    if (folder / "config.json").exists():
        return folder
    settings = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 8192} | SHAPES[name]
    config = AutoConfig.for_model(**settings)
    weights = config.num_hidden_layers * config.hidden_size * config.intermediate_size
    in_4_bits = weights > 2.5e8
    config.dtype, config.architectures = torch.bfloat16, [_class_of(config.model_type)]
    if in_4_bits:
        config.quantization_config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": "uint8",
        }  # fmt: skip
    with write_folder(folder) as writer:
        write_shards(writer.path, _tensors(config, in_4_bits))
        config.save_pretrained(writer.path)
        load_tokenizer(smollm2_path()).save_pretrained(writer.path)
    return folder


def _class_of(model_type: str) -> str:
    return {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma3"}[model_type] + "ForCausalLM"


def _tensors(config: Any, in_4_bits: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Random weights, one tensor at a time; linear layers in 4 bits are made once a shape and written again."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    generator = torch.Generator().manual_seed(0)
    made: dict[tuple[int, ...], Any] = {}
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        is_linear = parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
        if not (in_4_bits and is_linear):
            scale = 0.02 if parameter.dim() == 2 else 1.0
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.bfloat16).mul_(scale)
            yield name, values if parameter.dim() == 2 else torch.ones_like(values)
            continue
        shape = tuple(parameter.shape)
        if shape not in made:
            made[shape] = quantize(torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(0.02))
        weight = made[shape]
        yield name, weight.codes.view(-1, 1)
        for key, tensor in weight.bnb_tensors().items():
            yield f"{name}.{key}", tensor


def text_file(path: Path, tokens: int) -> Path:
    """Running text, more than `tokens` tokens a line: with truncation every pack is full."""
    words = ["memory", "budget", "plan", "layer", "token", "head", "norm", "gate", "query", "key", "value", "page"]
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=tokens + 8))}) for _ in range(16)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class ControlGroup:
    """A memory control group of one's own, gone at the end of the block."""

    def __init__(self, limit: int) -> None:
        version_1 = Path("/sys/fs/cgroup/memory")
        self._v1 = version_1.is_dir()
        self._path = (version_1 if self._v1 else Path("/sys/fs/cgroup")) / f"halfbyte-{os.getpid()}"
        self._limit = limit

    def __enter__(self) -> ControlGroup:
        self._path.mkdir()
        self._write("memory.limit_in_bytes" if self._v1 else "memory.max", str(self._limit))
        if not self._v1 and (self._path / "memory.swap.max").exists():
            self._write("memory.swap.max", "0")
        return self

    def __exit__(self, *_: object) -> None:
        for _attempt in range(50):
            try:
                self._path.rmdir()
                return
            except OSError:  # the kernel is still taking the last process out
                time.sleep(0.1)

    def enter(self) -> None:
        """Put the calling process in."""
        self._write("cgroup.procs", str(os.getpid()))

    def kills(self) -> int:
        """Processes that were killed for want of memory."""
        file = self._path / ("memory.oom_control" if self._v1 else "memory.events")
        counts = dict(line.split() for line in file.read_text().splitlines())
        return int(counts.get("oom_kill", 0))

    def _write(self, name: str, text: str) -> None:
        (self._path / name).write_text(text)


def run(case: Case, work: Path) -> dict[str, Any]:
    """Train two steps of `case` under its limit."""
    folder = model_folder(work / "models" / case.model, case.model)
    data = text_file(work / f"text-{case.tokens}.jsonl", case.tokens)
    settings = (
        f"data.max_seq_len={case.tokens}", "data.on_long=truncate", "data.format=text", f"lora.r={case.rank}",
        f"train.micro_batch_size={case.batch}", *case.settings,
    )  # fmt: skip
    command = [
        sys.executable, "-m", "halfbyte", "train", "--model", str(folder), "--data", str(data), "--json",
        "--output", str(work / "run"), "--steps", "2", "--resume", "never", "--memory", case.budget,
    ]  # fmt: skip
    command += [part for setting in settings for part in ("--set", setting)]
    started = time.perf_counter()
    with ControlGroup(parse_bytes(case.budget)) as group:
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=group.enter)
        kills = group.kills()
    row: dict[str, Any] = {**vars(case), "exit": done.returncode, "oom_kills": kills,
                           "seconds": time.perf_counter() - started}  # fmt: skip
    if done.returncode:
        return row | {"error": done.stderr.strip().splitlines()[-1:]}
    result = json.loads(done.stdout.strip().splitlines()[-1])
    changes = [line.strip() for line in done.stderr.splitlines() if "to fit:" in line]
    return row | {"planned": result["predicted_peak_memory"], "measured": result["peak_memory"], "changes": changes,
                  "tokens_per_s": result["tokens_per_s"]}  # fmt: skip


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of shapes, with commas")
    parser.add_argument("--work", type=Path, default=Path("bench-work/memory"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    wanted = set(filter(None, options.only.split(",")))
    rows = []
    for case in CASES:
        if not wanted or case.model in wanted:
            rows.append(run(case, options.work))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if options.output:
                write_result(options.output, {"rows": rows})
    table = Table("model", "tokens", "batch", "r", "budget", "planned", "measured", "plan above", "changed to fit")
    for row in rows:
        if row["exit"]:
            table.add_row(row["model"], str(row["tokens"]), "", "", row["budget"], f"exit {row['exit']}")
            continue
        above = f"{row['planned'] / row['measured'] - 1:+.1%}"
        changed = "; ".join(text.partition(":")[2].strip().split(":")[0] for text in row["changes"])
        table.add_row(
            row["model"], str(row["tokens"]), str(row["batch"]), str(row["rank"]), row["budget"],
            format_bytes(row["planned"]), format_bytes(row["measured"]), above, changed,
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
