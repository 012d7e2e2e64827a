"""Adapters on a loaded base: fresh ones, saved ones, and which layers get one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from halfbyte.checkpoint import load_adapter, save_adapter
from halfbyte.config import LoraConfig, QuantConfig
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.model.adapt import adapter_state, attach_lora, attach_saved, load_adapter_state
from halfbyte.model.load import LoadedModel, load_model
from halfbyte.model.targets import matches, modules_to_adapt, modules_to_quantize
from halfbyte.nn import Linear4bit

# peft 0.21 asks transformers 5.23 by a name that will go in its version 6
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

IDS = torch.arange(3, 23).unsqueeze(0)
SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]

Load = Callable[..., LoadedModel]


@pytest.fixture
def load(tiny_llama: Path) -> Load:
    return lambda **quant: load_model(str(tiny_llama), QuantConfig(**quant), compute_dtype=torch.float32)


def randomized(state: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(tensor.shape, generator=generator) / 10 for name, tensor in state.items()}


def test_fresh_adapter_changes_nothing(load: Load) -> None:
    """B is zero, so the logits are the base's to the bit; A comes from the seed alone."""
    loaded = load()
    with torch.no_grad():
        before = loaded.model(IDS).logits
        torch.manual_seed(123)
        rng = torch.random.get_rng_state()
        model = attach_lora(loaded.model, LoraConfig(r=4), seed=7)
        assert torch.equal(torch.random.get_rng_state(), rng)
        assert torch.equal(model(IDS).logits, before)
    state = adapter_state(model)
    assert len(state) == 28
    assert all(bool(tensor.any()) is ("lora_A" in name) for name, tensor in state.items())
    again = adapter_state(attach_lora(load().model, LoraConfig(r=4), seed=7))
    other = adapter_state(attach_lora(load().model, LoraConfig(r=4), seed=8))
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in state.items())
    assert model.peft_config["default"].target_modules == set(SEVEN)


def test_saved_adapter_round_trip(load: Load, tmp_path: Path) -> None:
    """From one model through a folder onto another: equal logits, equal tensors, dropout off."""
    model = attach_lora(load().model, LoraConfig(r=4, dropout=0.5), seed=0)
    load_adapter_state(model, randomized(adapter_state(model)))
    save_adapter(tmp_path / "a", adapter_state(model), model.peft_config["default"].to_dict(), {})
    other = attach_saved(load().model, load_adapter(tmp_path / "a"))
    with torch.no_grad():
        assert torch.equal(other.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    assert not [name for name, p in other.named_parameters() if p.requires_grad]


def test_what_does_not_fit_is_listed(load: Load) -> None:
    model = attach_lora(load().model, LoraConfig(r=4), seed=0)
    state = adapter_state(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    first, second = list(state)[:2]
    with pytest.raises(AdapterError, match=f"1 tensors do not fit this model: {first} is missing"):
        load_adapter_state(model, {name: tensor for name, tensor in state.items() if name != first})
    with pytest.raises(AdapterError, match="extra has no place"):
        load_adapter_state(model, state | {"extra": torch.ones(1)})
    with pytest.raises(AdapterError, match=rf"{second} has shape \(1, 1\), not \(\d+, \d+\)"):
        load_adapter_state(model, state | {second: torch.ones(1, 1)})
    with pytest.raises(AdapterError, match=r"28 tensors do not fit this model: (\S+ is missing; ){4}\S+ is missing"):
        load_adapter_state(model, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())


def test_saved_adapter_of_another_model(load: Load, tmp_path: Path, make_llama: Callable[..., Path]) -> None:
    model = attach_lora(load().model, LoraConfig(r=4), seed=0)
    save_adapter(tmp_path / "a", adapter_state(model), model.peft_config["default"].to_dict(), {})
    deeper = load_model(str(make_llama(num_hidden_layers=3)), QuantConfig(), compute_dtype=torch.float32)
    with pytest.raises(AdapterError, match="14 tensors do not fit this model"):
        attach_saved(deeper.model, load_adapter(tmp_path / "a"))


# -- which layers ------------------------------------------------------------------------------------------------


def test_matches() -> None:
    assert matches("model.layers.0.mlp.up_proj", ("up_proj",))
    assert matches("model.layers.0.mlp.up_proj", ("mlp.up_proj", "x"))
    assert matches("up_proj", ("up_proj",))
    assert not matches("model.layers.0.mlp.gate_up_proj", ("up_proj",))
    assert not matches("model.layers.0.mlp.up_proj", ("0", "mlp", ""))


def test_all_linear_is_every_layer_but_the_head(load: Load) -> None:
    model = load().model
    names = modules_to_adapt(model, "all-linear")
    assert len(names) == 14
    assert not [name for name in names if "lm_head" in name]
    assert all(isinstance(model.get_submodule(name), Linear4bit) for name in names)


def test_named_layers(load: Load) -> None:
    model = load(skip_modules=("down_proj",)).model
    assert len(modules_to_adapt(model, "all-linear")) == 12  # what is in 4 bits
    assert modules_to_adapt(model, ("layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj")) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"qproj, z name no layer .* This model has down_proj, gate_proj, k_proj"):
        modules_to_adapt(model, ("qproj", "q_proj", "z"))


def test_part_of_the_layers_of_a_name(load: Load) -> None:
    """A name that covers more than was asked for is spelled out in PEFT's config."""
    model = attach_lora(load().model, LoraConfig(r=4, target_modules=("layers.1.mlp.up_proj",)), seed=0)
    assert model.peft_config["default"].target_modules == {"model.layers.1.mlp.up_proj"}
    assert len(adapter_state(model)) == 2


def test_tied_and_skipped_layers_are_not_quantized(make_llama: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_llama(tie_word_embeddings=True))
    assert len(modules_to_quantize(model, ())) == 14
    assert len(modules_to_quantize(model, ("mlp.up_proj", "model.layers.0.self_attn.q_proj"))) == 11
    with pytest.raises(ConfigError, match="'proj' names no linear layer"):
        modules_to_quantize(model, ("proj",))
