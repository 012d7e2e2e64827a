"""A run that goes on from any of its checkpoints comes to the same bytes, whatever it trains with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import QuantConfig, RunConfig
from halfbyte.model.quantize import quantize_model
from halfbyte.train import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
]
STEPS = 10
UNPACKED = {"data__packing": False, "train__micro_batch_size": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "dropout": {"lora__dropout": 0.2},
    "unpacked": UNPACKED,
    "accumulation": {**UNPACKED, "train__gradient_accumulation_steps": 3, "optim__schedule": "cosine"},
    "several epochs": {**UNPACKED, "train__micro_batch_size": 16, "optim__warmup_steps": 4},
    "8-bit": {"optim__bits": 8, "lora__r": 64},
    "paged": {"optim__paged": True, "memory__optimizer_budget": "40kB"},
    "streamed": {"memory__weights": "stream"},
    "streamed, activations on disk, checkpointing": {
        "memory__weights": "stream", "memory__activations": "disk", "train__gradient_checkpointing": True,
    },
    "DoRA, streamed": {"lora__use_dora": True, "memory__weights": "stream"},
    "tokens, streamed": {"lora__trainable_tokens": ["After", "<|im_end|>"], "memory__weights": "stream"},
    "whole tables, 8-bit": {"lora__modules_to_save": ["lm_head", "embed_tokens"], "optim__bits": 8},
    "bfloat16": {"quant__compute_dtype": "bfloat16", "lora__dropout": 0.2},
}  # fmt: skip


def everything(config: RunConfig) -> dict[str, Any]:
    """Losses to the last bit, and the bytes of the last checkpoint and the adapter."""
    output = Path(config.train.output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = output / f"checkpoint-{STEPS}"
    names = ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors")
    files = [output / "adapter" / names[0], *(last / name for name in names)]
    losses = [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]
    return {"losses": losses, **{f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.timeout(900)
def test_any_checkpoint_leads_to_the_same_end(
    make_run: Callable[..., RunConfig], variant: str, tiny_llama: Path, tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    settings = VARIANTS[variant] | {"train__steps": STEPS, "train__save_every": 1, "train__keep": STEPS}
    if "streamed" in variant:
        quantize_model(str(tiny_llama), tmp_path / "base", QuantConfig())
        settings["model__path"] = str(tmp_path / "base")
    whole = make_run("whole", **settings)
    train(whole)
    expected = everything(whole)
    assert [step for step, _ in expected["losses"]] == list(range(1, STEPS + 1))
    for point in range(1, STEPS + 1):
        cut = make_run(f"from-{point}", **settings)
        output = Path(cut.train.output)
        shutil.copytree(whole.train.output, output)
        shutil.rmtree(output / "adapter")
        for later in range(point + 1, STEPS + 1):
            shutil.rmtree(output / f"checkpoint-{later}")
        train(cut)
        got = everything(cut)
        assert [name for name in expected if got[name] != expected[name]] == [], f"from step {point}"
        shutil.rmtree(output)
    record_property("points bit-equal", STEPS)
