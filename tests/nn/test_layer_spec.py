"""What is read off the decoder layers of transformers' families."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from halfbyte.nn import Linear4bit
from halfbyte.nn.layer_spec import LayerSpec, describe, projection

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def first_layer(family: str, **extra: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**SMALL, **extra)
    layer = transformers.AutoModelForCausalLM.from_config(config).base_model.layers[0]
    assert isinstance(layer, nn.Module)
    return layer


DESCRIBED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama": ({}, {"activation": "silu", "sliding_window": 0, "head_dim": 16, "num_heads": 4, "num_kv_heads": 2}),
    "Mistral": ({"head_dim": 16, "sliding_window": 8}, {"sliding_window": 8}),
    "Qwen2": ({}, {"q_norm": None, "sliding_window": 0}),
    "Qwen3": ({"head_dim": 32}, {"head_dim": 32, "post_mlp_norm": None}),
    "Gemma": ({"head_dim": 16}, {"activation": "gelu_tanh"}),
    "Gemma3Text": ({"head_dim": 16, "sliding_window": 8}, {"activation": "gelu_tanh", "sliding_window": 8}),
    "Phi3": ({}, {"activation": "silu"}),
}  # fmt: skip


@pytest.mark.parametrize("family", DESCRIBED)
def test_families_that_are_described(family: str) -> None:
    extra, expected = DESCRIBED[family]
    spec = describe(first_layer(family, **extra))
    assert isinstance(spec, LayerSpec)
    for field, value in expected.items():
        assert getattr(spec, field) == value, field
    assert spec.input_norm.offset == (1.0 if family.startswith("Gemma") else 0.0)
    assert (spec.q_norm is None) == (family not in ("Qwen3", "Gemma3Text"))
    assert (len(spec.qkv), len(spec.gate_up)) == ((1, 1) if family == "Phi3" else (3, 2))


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("Phi", {}), ("Starcoder2", {}), ("Olmo2", {}), ("Cohere", {}), ("Qwen2Moe", {"num_experts": 2}),
        ("Gemma2", {"head_dim": 16}), ("Phi3", {"resid_pdrop": 0.1}),
    ],
)  # fmt: skip
def test_families_that_are_not(family: str, extra: dict[str, Any]) -> None:
    """Other norms, parallel branches, experts, soft caps, dropout on the residual stream."""
    assert describe(first_layer(family, **extra)) is None


def test_a_projection_is_a_4bit_layer_with_at_most_one_plain_adapter() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Linear4bit.from_weight(torch.randn(64, 64))
            self.b = nn.Linear(64, 64)

    model = Model()
    assert projection(model.b, training=False) is None
    found = projection(model.a, training=True)
    assert found is not None
    assert found.lora_A is None
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["a"], lora_dropout=0.1))
    layer = adapted.base_model.model.a
    assert projection(layer, training=True) is None, "dropout"
    found = projection(layer, training=False)
    assert found is not None
    assert found.lora_A is layer.lora_A["default"].weight
    assert found.scaling == 2.0
    with adapted.disable_adapter():
        found = projection(layer, training=False)
        assert found is not None
        assert found.lora_A is None
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["a"]))
    adapted.base_model.set_adapter(["default", "other"])
    assert projection(layer, training=False) is None, "two at once"
