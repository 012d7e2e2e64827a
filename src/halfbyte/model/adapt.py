"""LoRA on a loaded base, through PEFT: its layers, its names, its file format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.checkpoint.adapter import Adapter, pairs
from halfbyte.config import LoraConfig
from halfbyte.errors import AdapterError
from halfbyte.model.dora import reset_magnitudes, use_dora
from halfbyte.model.targets import modules_to_adapt
from halfbyte.model.tokens import NONE, Tokens
from halfbyte.model.trained_rows import load_rows, place_rows, rows_state, train_rows
from halfbyte.nn.lora_linear import fuse_lora_layers


def attach_lora(
    model: PreTrainedModel, lora: LoraConfig, *, seed: int, tokens: Tokens = NONE
) -> peft.PeftModel:  # fmt: skip
    """Put a fresh adapter (A uniform, B zero, float32) on the layers that `lora` names, and have the rows of `tokens`
    and the tables that it names trained; nothing else is trainable.

    The random numbers come from `seed` alone, whatever ran before.

    Raises:
        ConfigError: what `lora` names is not there, or cannot be trained.
    """
    config = peft_config(model, lora, modules_to_adapt(model, lora.target_modules))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
    if lora.use_dora:
        use_dora(adapted, "default")
    fuse_lora_layers(adapted)
    for key, value in train_rows(model, lora, tokens).items():
        setattr(adapted.peft_config["default"], key, value)
    return adapted


def peft_config(model: PreTrainedModel, lora: LoraConfig, names: list[str]) -> peft.LoraConfig:
    """PEFT's config of an adapter on the layers `names` of `model`; DoRA's is set by `use_dora`."""
    return peft.LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.dropout, use_rslora=lora.use_rslora,
        target_modules=shortest_names(model, names), task_type="CAUSAL_LM",
    )  # fmt: skip


def begin_at(model: peft.PeftModel, start: Adapter, scaling: float) -> None:
    """Give the fresh adapter of `model`, whose update is scaled by `scaling`, the update of `start`.

    Raises:
        AdapterError: it is of other layers or of another rank.
    """
    factors = {module: own / scaling for module, (_, _, own) in pairs(start).items()}
    state = adapter_state(model)  # of magnitudes and rows of tokens, which a start has none of
    own = {name: tensor for name, tensor in state.items() if ".lora_A." not in name and ".lora_B." not in name}
    load_adapter_state(model, own | {
        name: tensor * factors[name.removeprefix("base_model.model.").rpartition(".lora_")[0]] if ".lora_B." in name
        else tensor for name, tensor in start.state.items()
    })  # fmt: skip
    if model.peft_config["default"].use_dora:
        reset_magnitudes(model)


def attach_saved(model: PreTrainedModel | peft.PeftModel, adapter: Adapter, name: str = "default") -> peft.PeftModel:
    """Put a saved adapter on `model`, beside those that it has, for evaluation and generation.

    Raises:
        AdapterError: its tensors and the model's layers do not match one to one.
    """
    adapted = wrap(model, adapter, name)
    place_rows(adapted.get_base_model(), adapter)
    load_adapter_state(adapted, adapter.state, name, where=str(adapter.folder))
    fuse_lora_layers(adapted)
    return adapted


def wrap(
    model: PreTrainedModel | peft.PeftModel, adapter: Adapter, name: str = "default", *, on_meta: bool = False
) -> peft.PeftModel:
    """`model` in PEFT's wrapper as the config of `adapter` says, its tensors not yet those of `adapter`.

    Raises:
        AdapterError: the config names no layer of this model.
    """
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    config = peft.LoraConfig(**{key: value for key, value in adapter.config.items() if key in known})
    config.inference_mode = True
    dora, config.use_dora = config.use_dora, False
    config.trainable_token_indices = config.modules_to_save = None  # ours, not PEFT's modules
    config.ensure_weight_tying = False
    config.base_model_name_or_path = None  # the base is known by its hash; PEFT would warn of another path
    try:
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config, low_cpu_mem_usage=on_meta)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=on_meta)
    except ValueError as error:
        raise AdapterError(
            "does not fit this model", where=str(adapter.folder), why=str(error).splitlines()[0]
        ) from error
    if dora:
        use_dora(model, name)
    return model


def adapter_state(model: peft.PeftModel, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under the names of PEFT's files."""
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: tensor for key, tensor in state.items() if ".lora_" in key} | rows_state(model)


def load_adapter_state(
    model: peft.PeftModel, state: dict[str, Tensor], name: str = "default", *, where: str = ""
) -> None:
    """Put `state` into the adapter `name` of `model`, every tensor of one into the other.

    Raises:
        AdapterError: names or shapes differ, listing the first five of each.
    """
    check_fit(adapter_state(model, name), state, where)
    peft.set_peft_model_state_dict(model, load_rows(model, state), adapter_name=name)


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str = "") -> None:
    """AdapterError unless `state` has the names and shapes of `own`, listing the first five that differ."""
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} has no place" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise AdapterError(
            f"{len(problems)} tensors do not fit this model", where=where, why="; ".join(problems[:5]),
            fix="Give the base that the adapter was trained on",
        )  # fmt: skip


def shortest_names(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Last parts such as "q_proj" where they name just these layers, as other tools write them; else full names."""
    last_parts = sorted({name.rpartition(".")[2] for name in names})
    chosen = set(names)
    covered = {
        name for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.rpartition(".")[2] in last_parts
    }  # fmt: skip
    return last_parts if covered == chosen else sorted(names)
