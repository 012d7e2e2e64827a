"""from_pretrained with HalfbyteConfig, for every architecture: what is loaded, saved, trained and merged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import ConfigError
from halfbyte.model.hf_config import HalfbyteConfig, prequantized_config
from halfbyte.nn import Linear4bit

# peft 0.21, trl 1.16 and every recipe use the names transformers 5.23 has replaced by activation_checkpointing*.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

EXACT = {"rtol": 0.0, "atol": 0.0}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums in another order: at most 9e-7 (GPT-2, whose Conv1D multiplies by addmm) at logits of 3; 0 for most."""


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**batch).logits
    return result


def layers(model: nn.Module) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def base_bytes(model: nn.Module) -> str:
    """Hash of every packed weight and its scales."""
    digest = hashlib.sha256()
    for layer in layers(model).values():
        weight = layer.quantized_weight
        for tensor in (weight.codes, weight.absmax, weight.nested_absmax):
            if tensor is not None:
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def wrap(model: Any, task: str | None) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type=task))


def test_logits_are_those_of_the_dequantized_weights(tiny: Any) -> None:
    model = tiny.load(quantization_config=HalfbyteConfig())
    plain = tiny.load()
    found = layers(model)
    for name, layer in found.items():
        target = plain.get_submodule(name)
        weight = layer.dequantize()
        target.weight.data = weight.T if isinstance(target, Conv1D) else weight
    torch.testing.assert_close(logits(model, tiny.batch()), logits(plain, tiny.batch()), **ROUNDING)
    # Nothing but the head, what is tied to it, and what the architecture keeps in fp32 is left.
    left = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)} - set(found)
    assert {name.rpartition(".")[2] for name in left} <= {"lm_head", "classifier", "wo"}, left
    assert len(found) >= 8


def test_save_and_reload_gives_the_same_bytes_and_logits(tiny: Any, tmp_path: Path) -> None:
    model = tiny.load(quantization_config=HalfbyteConfig())
    model.save_pretrained(tmp_path)
    again = tiny.case.load(tmp_path, config=prequantized_config(tmp_path))
    assert base_bytes(again) == base_bytes(model)
    assert torch.equal(logits(again, tiny.batch()), logits(model, tiny.batch()))
    again.save_pretrained(tmp_path / "again")  # and it can be saved once more, as the same config
    configs = [json.loads((p / "config.json").read_text()) for p in (tmp_path, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_trains_every_adapter_and_leaves_the_base(tiny: Any, checkpointing: bool) -> None:
    model = wrap(tiny.load(quantization_config=HalfbyteConfig()), tiny.case.task)
    assert all(name.endswith("base_layer") for name in layers(model))
    if checkpointing:
        model.gradient_checkpointing_enable()
    before, batch = base_bytes(model), tiny.batch()
    model.train()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapters.values(), lr=5e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    idle = [name for name, p in adapters.items() if p.grad is None or not p.grad.any()]
    assert not idle
    assert base_bytes(model) == before


def test_merging_is_refused_until_the_base_is_dequantized(tiny: Any) -> None:
    model = wrap(tiny.load(quantization_config=HalfbyteConfig()), tiny.case.task)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    before, bytes_before, batch = logits(model.eval(), tiny.batch()), base_bytes(model), tiny.batch()
    with pytest.raises(ConfigError, match="dequantize"):
        model.merge_and_unload()
    assert base_bytes(model) == bytes_before
    model.get_base_model().dequantize()
    torch.testing.assert_close(logits(model, batch), before, **ROUNDING)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), before, **ROUNDING)
    assert not layers(merged)
    source = tiny.load()
    kinds = (nn.Linear, Conv1D)
    assert {n for n, m in merged.named_modules() if isinstance(m, kinds)} == {
        n for n, m in source.named_modules() if isinstance(m, kinds)
    }


def test_a_dequantized_model_saves_as_an_ordinary_one(tiny: Any, tmp_path: Path) -> None:
    model = tiny.load(quantization_config=HalfbyteConfig())
    model.dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = tiny.case.load(tmp_path)
    torch.testing.assert_close(logits(again, tiny.batch()), logits(model, tiny.batch()), **EXACT)
