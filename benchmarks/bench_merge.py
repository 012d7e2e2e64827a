"""What each way to merge keeps of the demo's adapter: held-out loss, distance from base + adapter, memory, seconds.

usage: bench_merge.py RUN MODEL RESULT.json       RUN: a folder that `halfbyte demo --output RUN` left
                                                  MODEL: its base in 16 bits

In 4 bits, beside what `halfbyte merge` does: every weight to its nearest code (merging in place does that), the same
from the original weights, and stochastic rounding.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import halfbyte, write_result
from torch import Tensor

from halfbyte.checkpoint import load_adapter
from halfbyte.config import DataConfig, QuantConfig
from halfbyte.merge.base import open_base
from halfbyte.merge.drift import DriftMeter, probe_of
from halfbyte.merge.fold import Fold
from halfbyte.merge.update import updates_of
from halfbyte.model import load_tokenizer
from halfbyte.model.lent import LentModel
from halfbyte.quant import quantize
from halfbyte.quant.absmax import expand_absmax
from halfbyte.quant.codebook import codebook

PROMPTS = 50
MERGES = {
    "16bit, quantized base": ["--format", "16bit"],
    "4bit, quantized base": ["--format", "4bit"],
    "gguf F16": ["--format", "gguf"],
    "gguf Q8_0": ["--format", "gguf", "--gguf-type", "Q8_0"],
    "gguf Q4_0": ["--format", "gguf", "--gguf-type", "Q4_0"],
    "16bit, original base": ["--format", "16bit", "--base", "original"],
    "4bit, original base": ["--format", "4bit", "--base", "original"],
}


def nearest(values: Tensor) -> Tensor:
    """Every weight to its nearest code."""
    return quantize(values).dequantize(torch.float32)


def stochastic(values: Tensor) -> Tensor:
    """Every weight to one of the two codes around it, so that the mean is right."""
    plain = quantize(values)
    assert plain.nested_absmax is not None
    scales = expand_absmax(plain.absmax, plain.nested_absmax, plain.nested_offset)
    steps = scales.repeat_interleave(64)[: values.numel()].view(values.shape)
    table = codebook("nf4").values
    scaled = values / steps.where(steps != 0, 1.0)
    low = (torch.bucketize(scaled, table, right=True) - 1).clamp(0, 14)
    up = torch.rand(values.shape) < (scaled - table[low]) / (table[low + 1] - table[low])
    return table[low + up.long()] * steps


def main(run: Path, model: str, result: Path) -> None:
    torch.manual_seed(0)
    adapter, base = load_adapter(run / "adapter"), open_base(model, QuantConfig())
    fold = Fold(base, updates_of(adapter, base.model))
    probe = probe_of(str(run / "held_out.jsonl"), load_tokenizer(model), DataConfig(), PROMPTS)
    meter = DriftMeter(LentModel(base.source), probe, fold.weight)
    original = replace(fold, original=base)

    def rounded(of: Fold, how: Any) -> Any:
        return lambda name: how(of.weight(name)) if name in base.targets else of.weight(name)

    simple = {
        "base alone": Fold(base, {}).weight, "4bit, nearest code": rounded(fold, nearest),
        "4bit, nearest code from the original": rounded(original, nearest),
        "4bit, stochastic": rounded(fold, stochastic),
    }  # fmt: skip
    rows: dict[str, Any] = {
        name: {"drift": drift.to_dict()} for name, drift in zip(simple, meter.measure(*simple.values()), strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, options) in enumerate(MERGES.items()):
            done = halfbyte(
                "merge", "--model", model, "--adapter", str(run / "adapter"), "--data", str(run / "held_out.jsonl"),
                "--output", str(Path(folder) / str(number)), "--max-drift", "9", *options,
            )  # fmt: skip
            shares = [layer["outputs"] for layer in done["survived"]]
            rows[name] = {key: done[key] for key in ("drift", "bytes_out", "peak_memory", "seconds")}
            rows[name]["share_in_outputs"] = sum(shares) / len(shares) if shares else None
            store(rows, run, result)  # after each, for they are minutes
    print(json.dumps({name: (row["kept"], row["drift"]["kl"]) for name, row in rows.items()}, indent=1))


def store(rows: dict[str, Any], run: Path, result: Path) -> None:
    """With the share of the held-out improvement that each keeps."""
    without, trained = rows["base alone"]["drift"]["loss"], rows["base alone"]["drift"]["trained_loss"]
    for row in rows.values():
        row["kept"] = (without - row["drift"]["loss"]) / (without - trained)
    write_result(result, {"run": run.name, "trained_loss": trained, "base_loss": without, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
