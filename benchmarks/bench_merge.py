"""What each way to merge keeps of the demo's adapter: held-out loss, distance from base + adapter, memory, seconds.

    python benchmarks/bench_merge.py [--run RUN] [--only rows,answers,combined] [--output RESULT.json]

rows: everything that `halfbyte merge` writes; in 4 bits, beside it, every weight to its nearest code (merging in place
does that), the same from the original weights, and stochastic rounding.
answers: what the GGUF file answers in llama.cpp to held-out prompts, token by token against halfbyte's own answers.
combined: two adapters, each trained on half of the data, as one.

RUN is a folder that `halfbyte demo --output RUN` left; without it one is made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import halfbyte, provenance, smollm2_folder, write_result
from torch import Tensor

from halfbyte.checkpoint import load_adapter
from halfbyte.config import DataConfig, QuantConfig
from halfbyte.merge.base import open_base
from halfbyte.merge.drift import DriftMeter, probe_of
from halfbyte.merge.fold import Fold
from halfbyte.merge.update import updates_of
from halfbyte.model import load_model, load_tokenizer
from halfbyte.model.adapt import attach_saved
from halfbyte.model.generate import generate_ids, prompt_ids
from halfbyte.model.lent import LentModel
from halfbyte.quant import quantize
from halfbyte.quant.absmax import expand_absmax
from halfbyte.quant.codebook import codebook

PROMPTS, NEW_TOKENS = 50, 24
ABSMAX = QuantConfig(scale="absmax")
LLAMA_CPP = Path(__file__).parents[1] / "tests" / "merge" / "llama_cpp.py"
MERGES = {
    "16bit, quantized base": ["--format", "16bit"],
    "4bit, quantized base": ["--format", "4bit"],
    "gguf F16": ["--format", "gguf"],
    "gguf Q8_0": ["--format", "gguf", "--gguf-type", "Q8_0"],
    "gguf Q5_1": ["--format", "gguf", "--gguf-type", "Q5_1"],
    "gguf Q4_0": ["--format", "gguf", "--gguf-type", "Q4_0"],
    "16bit, original base": ["--format", "16bit", "--base", "original"],
    "4bit, original base": ["--format", "4bit", "--base", "original"],
}
COMBINED = {
    "cat": [], "svd": [], "svd, rank 8": ["--rank", "8"], "linear": [], "ties_svd": [], "dare_linear_svd": [],
    "magnitude_prune_svd": [],
}  # fmt: skip


class Bench:
    """The run whose adapter is merged, and its results, stored after each: they are minutes."""

    def __init__(self, run: Path, model: str, output: Path) -> None:
        self.run, self.model, self._output = run, model, output
        known = output.is_file() and json.loads(output.read_text())
        parts = ("rows", "answers", "combined")
        self.results: dict[str, Any] = {key: known[key] for key in parts if known and key in known}
        self.commits: dict[str, str] = known.get("commits", {"rows": known["commit"]}) if known else {}

    @property
    def held_out(self) -> str:
        """The samples that everything is measured on."""
        return str(self.run / "held_out.jsonl")

    def fold(self) -> Fold:
        """Base + adapter, exactly."""
        adapter, base = load_adapter(self.run / "adapter"), open_base(self.model, ABSMAX)
        return Fold(base, updates_of(adapter, base.model))

    def merged(self, output: Path, *options: str) -> dict[str, Any]:
        """`halfbyte merge --json`."""
        return halfbyte("merge", "--model", self.model, "--data", self.held_out, "--output", str(output),
                        "--max-drift", "9", *options)  # fmt: skip

    def store(self, part: str, result: Any) -> None:
        """One part's results, the others' as they are."""
        self.results[part] = result
        self.commits[part] = provenance()["commit"]
        write_result(self._output, {"run": self.run.name, "commits": self.commits, **self.results})


def nearest(values: Tensor) -> Tensor:
    """Every weight to its nearest code."""
    return quantize(values, scale="absmax").dequantize(torch.float32)


def stochastic(values: Tensor) -> Tensor:
    """Every weight to one of the two codes around it, so that the mean is right."""
    plain = quantize(values, scale="absmax")
    assert plain.nested_absmax is not None
    scales = expand_absmax(plain.absmax, plain.nested_absmax, plain.nested_offset)
    steps = scales.repeat_interleave(64)[: values.numel()].view(values.shape)
    table = codebook("nf4", 64).values
    scaled = values / steps.where(steps != 0, 1.0)
    low = (torch.bucketize(scaled, table, right=True) - 1).clamp(0, 14)
    up = torch.rand(values.shape) < (scaled - table[low]) / (table[low + 1] - table[low])
    return table[low + up.long()] * steps


def rows(bench: Bench) -> None:
    """Each way to merge."""
    fold = bench.fold()
    base, original = fold.base, replace(fold, original=fold.base)
    meter = DriftMeter(
        LentModel(base.source), probe_of(bench.held_out, load_tokenizer(bench.model), DataConfig(), PROMPTS),
        fold.weight,
    )  # fmt: skip

    def rounded(of: Fold, how: Any) -> Any:
        return lambda name: how(of.weight(name)) if name in base.targets else of.weight(name)

    simple = {
        "base alone": Fold(base, {}).weight, "4bit, nearest code": rounded(fold, nearest),
        "4bit, nearest code from the original": rounded(original, nearest),
        "4bit, stochastic": rounded(fold, stochastic),
    }  # fmt: skip
    found: dict[str, Any] = {
        name: {"drift": drift.to_dict()} for name, drift in zip(simple, meter.measure(*simple.values()), strict=True)
    }
    without, trained = (found["base alone"]["drift"][key] for key in ("loss", "trained_loss"))
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, options) in enumerate(MERGES.items()):
            done = bench.merged(Path(folder) / str(number), "--adapter", str(bench.run / "adapter"), *options)
            shares = [layer["outputs"] for layer in done["survived"]]
            keys = ("drift", "bytes_out", "peak_memory", "predicted_peak_memory", "seconds")
            found[name] = {key: done[key] for key in keys}
            found[name]["share_in_outputs"] = sum(shares) / len(shares) if shares else None
            for row in found.values():
                row["kept"] = (without - row["drift"]["loss"]) / (without - trained)
            bench.store("rows", found)


def answers(bench: Bench) -> None:
    """Greedy answers in llama.cpp and in halfbyte, and base + adapter's logits in float32 where they first differ."""
    tokenizer, fold = load_tokenizer(bench.model), bench.fold()
    lines = Path(bench.held_out).read_text(encoding="utf-8").splitlines()[:PROMPTS]
    prompts = [prompt_ids(tokenizer, json.loads(line)["messages"][:-1]) for line in lines]

    def ours(dtype: torch.dtype) -> list[list[int]]:
        loaded = load_model(bench.model, ABSMAX, compute_dtype=dtype).model
        adapted = attach_saved(loaded, load_adapter(bench.run / "adapter"))
        return [generate_ids(adapted, tokenizer, [prompt], max_new_tokens=NEW_TOKENS)[0] for prompt in prompts]

    wanted = ours(torch.float32)
    exact = LentModel(fold.base.source)
    with tempfile.TemporaryDirectory() as folder:
        bench.merged(Path(folder) / "f16", "--adapter", str(bench.run / "adapter"), "--format", "gguf")
        job = {"model": f"{folder}/f16/f16-F16.gguf", "prompts": prompts, "tokens": NEW_TOKENS, "context": 512}
        found = {
            "llama.cpp as it comes": llama_cpp(job, tokenizer.eos_token_id),
            "llama.cpp, no flash attention, F16 cache": llama_cpp(job, tokenizer.eos_token_id, cache="f16"),
            "llama.cpp, no flash attention, F32 cache": llama_cpp(job, tokenizer.eos_token_id, cache="f32"),
            "halfbyte, computing in bfloat16": ours(torch.bfloat16),
        }
    result: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(map(len, wanted))}
    for name, others in found.items():
        differ = [i for i in range(len(prompts)) if wanted[i] != others[i]]
        firsts = [first_difference(exact, fold, prompts[i], wanted[i], others[i]) for i in differ]
        result[name] = {"equal": len(prompts) - len(differ), "first_differences": firsts}
    bench.store("answers", result)


def llama_cpp(job: dict[str, Any], end: int, **more: str) -> list[list[int]]:
    """Answers of llama.cpp, without the end token."""
    done = subprocess.run(
        [sys.executable, LLAMA_CPP], input=json.dumps({**job, **more}), stdout=subprocess.PIPE, text=True, check=True
    )
    return [[token for token in answer if token != end] for answer in json.loads(done.stdout)]


def first_difference(
    model: LentModel, fold: Fold, prompt: list[int], ours: list[int], theirs: list[int]
) -> dict[str, Any]:
    """Where two answers part, and how far base + adapter's first choice is there before its second, in logits."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    best = model.logits(torch.tensor([prompt + ours[:same]]), fold.weight)[0, -1].topk(2)
    chosen = [(answer[same : same + 1] or [None])[0] for answer in (ours, theirs)]
    return {
        "token": same, "halfbyte": chosen[0], "other": chosen[1], "best": best.indices.tolist(),
        "gap": float(best.values[0] - best.values[1]),
    }  # fmt: skip


def combined(bench: Bench) -> None:
    """Half of each of two adapters, combined in each way, against the exact sum."""
    lines = (bench.run / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    adapters, found = [], {}
    for number in range(2):
        folder, data = bench.run / f"half-{number}", bench.run / f"half-{number}.jsonl"
        if not (folder / "adapter").exists():
            data.write_text("".join(lines[number::2]), encoding="utf-8")
            halfbyte("train", "--model", bench.model, "--data", str(data), "--output", str(folder), "--steps", "100",
                     "--set", "data.max_seq_len=512", "--set", "optim.lr=1e-3", "--set", "quant.scale=absmax",
                     "--set", "optim.schedule=cosine")  # fmt: skip
        adapters += ["--adapter", f"{folder / 'adapter'}=0.5"]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            alone = bench.merged(Path(folder) / f"half-{number}", adapters[0::2][number], adapters[1::2][number][:-4],
                                 "--format", "adapter")  # fmt: skip
            found[f"adapter {number + 1} alone"] = {"drift": alone["drift"]}
        for number, (name, options) in enumerate(COMBINED.items()):
            how = ["--format", "adapter", "--combine", name.partition(",")[0], *options]
            done = bench.merged(Path(folder) / str(number), *adapters, *how)
            found[name] = {key: done[key] for key in ("drift", "bytes_out", "peak_memory", "seconds")}
            bench.store("combined", found)


PARTS: dict[str, Callable[[Bench], None]] = {"rows": rows, "answers": answers, "combined": combined}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--run", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "merge.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = str(smollm2_folder(options.work / "model"))
    run = options.run or options.work / "merge-run"
    if not (run / "adapter").exists():
        halfbyte("demo", "--model", model, "--output", str(run))
    bench = Bench(run, model, options.output)
    for part in options.only.split(","):
        PARTS[part](bench)


if __name__ == "__main__":
    main()
