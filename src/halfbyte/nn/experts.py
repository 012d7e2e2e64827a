"""The experts of a mixture: each has linear layers of its own, where transformers has a 3-D tensor of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "halfbyte"
"""Of `experts_forward`, among the ways in which transformers computes experts (config._experts_implementation)."""


def is_covered(module: nn.Module) -> bool:
    """Whether `experts_forward` computes what this module does: it follows transformers' interface for experts, its
    weights (experts, out, in), gate before up, without biases."""
    flags = {name: getattr(module, name, None) for name in ("is_transposed", "has_bias", "has_post_expert_norm")}
    concatenated = getattr(module, "is_concatenated", False) or not getattr(module, "has_gate", True)
    weights = [weight for weight in module._parameters.values() if weight is not None]
    return concatenated and not any(flags.values()) and None not in flags.values() and (
        len(weights) == 2 and all(weight.dim() == 3 for weight in weights)
    )  # fmt: skip


def split(module: nn.Module, layers: Sequence[str]) -> None:
    """Give `module`, a skeleton of experts as transformers made it, a module for each expert, "0", "1", ..., with
    linear layers in the place of its slices of the 3-D parameters.

    Args:
        layers: their names: gate, up and down, or up and down.
    """
    *first, down = module.expert_layers = tuple(layers)  # type: ignore[assignment]
    whole, back = (cast(Tensor, module._parameters.pop(name)) for name in list(module._parameters))
    module._is_hf_initialized = True  # type: ignore[assignment]  # transformers would look for the 3-D ones
    sizes = [(name, whole.shape[2], whole.shape[1] // len(first)) for name in first]
    sizes.append((down, back.shape[2], back.shape[1]))
    for number in range(len(whole)):
        expert = nn.Module()
        for name, into, out in sizes:
            expert.add_module(name, nn.Linear(into, out, bias=False, device="meta", dtype=whole.dtype))
        module.add_module(str(number), expert)


def join(module: nn.Module) -> None:
    """The way back: the 3-D parameters of `module`, the layers of whose experts are plain ones again."""
    experts, (*first, down) = experts_of(module), layers_of(module)
    whole = torch.stack([torch.cat([weight_of(expert, name) for name in first]) for expert in experts])
    back = torch.stack([weight_of(expert, down) for expert in experts])
    for number in range(len(experts)):
        delattr(module, str(number))
    module.register_parameter(joined_name(module), nn.Parameter(whole))
    module.register_parameter("down_proj", nn.Parameter(back))
    del module.expert_layers


def weight_of(expert: nn.Module, layer: str) -> Tensor:
    """Of a plain layer of an expert."""
    return cast(Tensor, expert.get_submodule(layer).weight).detach()


def joined_name(module: nn.Module) -> str:
    """Of transformers' 3-D weight over the experts' input."""
    return "gate_up_proj" if len(layers_of(module)) == 3 else "up_proj"


def layers_of(module: nn.Module) -> tuple[str, ...]:
    """What the experts of this module call their layers; empty where they have none of their own."""
    return cast(tuple[str, ...], getattr(module, "expert_layers", ()))


def experts_of(module: nn.Module) -> list[nn.Module]:
    """The experts of a module that is split, in order."""
    return [expert for name, expert in module.named_children() if name.isdecimal()]


def use_split_experts(model: Any) -> None:
    """Have `model`, whose experts are split, compute with them."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    model.config._experts_implementation = NAME


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' own sum over experts. Each sees its tokens at once; one that has none is not decoded.

    Sums are of k terms in the order of `top_k_index`: the same bits every time, on a GPU too, and whatever other
    tokens there are.

    Args:
        hidden_states: (T, hidden). top_k_index, top_k_weights: (T, k); an index beyond the experts is none.

    Returns:
        (T, hidden) in the dtype of `hidden_states`.
    """
    (count, width), k, experts = hidden_states.shape, top_k_index.shape[1], experts_of(self)
    pairs = top_k_index.reshape(-1)
    order = pairs.argsort(stable=True)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    sizes = torch.bincount(pairs, minlength=len(experts)).tolist()
    rows = hidden_states.unsqueeze(1).expand(count, k, width).reshape(-1, width).index_select(0, order)
    y = torch.cat([
        _expert(self, experts[number], part) if len(part) and number < len(experts) else torch.zeros_like(part)
        for number, part in enumerate(rows.split(sizes))
    ])  # fmt: skip
    del rows
    y = y.index_select(0, place).view(count, k, width)
    return (y * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _expert(module: Any, expert: nn.Module, x: Tensor) -> Tensor:
    *first, down = layers_of(module)
    y = torch.cat([expert.get_submodule(name)(x) for name in first], dim=-1)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    return cast(Tensor, expert.get_submodule(down)(y))
