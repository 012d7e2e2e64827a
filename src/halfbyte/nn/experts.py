"""The experts of a mixture, which transformers holds in one 3-D tensor: each quantized by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.quant import QuantizedWeight

NAME = "halfbyte"
"""Of `experts_forward`, among the ways in which transformers computes experts (config._experts_implementation)."""
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""By transformers' convention; experts without a gate have the second in the place of the first."""


class ExpertStack(nn.Module):
    """Frozen weights of all experts, (experts, out_features, in_features); blocks end with an expert.

    It has no parameters: nothing takes it for a linear layer, and saved it is the decoded 3-D tensor it stands for,
    which no reader of 4-bit files can mistake.

    Args:
        weights: of each expert, alike in shape and recipe.
        compute_dtype: of products; None: that of the input.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None

    def __init__(self, weights: Sequence[QuantizedWeight], compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        first = weights[0]
        nested = [w.nested_absmax for w in weights if w.nested_absmax is not None]
        self.register_buffer("codes", torch.stack([w.codes for w in weights]), persistent=False)
        self.register_buffer("absmax", torch.stack([w.absmax for w in weights]), persistent=False)
        self.register_buffer("nested_absmax", torch.stack(nested) if nested else None, persistent=False)
        self.offsets = [w.nested_offset for w in weights]
        self.like = replace(first, codes=first.codes[:0], absmax=first.absmax[:0], nested_absmax=None)
        self.compute_dtype = compute_dtype

    def __len__(self) -> int:
        return len(self.offsets)

    def expert(self, number: int) -> QuantizedWeight:
        """The weight of one expert, sharing this module's bytes."""
        nested = None if self.nested_absmax is None else self.nested_absmax[number]
        return replace(
            self.like, codes=self.codes[number], absmax=self.absmax[number], nested_absmax=nested,
            nested_offset=self.offsets[number],
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return sum(self.expert(number).nbytes for number in range(len(self)))

    def forward(self, x: Tensor, number: int) -> Tensor:
        """(T, in_features) -> (T, out_features) by one expert, in the dtype of `x`."""
        weight, dtype = self.expert(number), self.compute_dtype or x.dtype
        y: Tensor = torch.ops.halfbyte.linear_4bit(x.to(dtype), *weight.op_args, weight.shape[0], None)
        return y.to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """All experts decoded, (experts, out_features, in_features)."""
        return torch.stack([self.expert(number).dequantize(dtype) for number in range(len(self))])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix.removesuffix(".")] = self.dequantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)  # type: ignore[no-untyped-call,no-any-return]


def is_covered(module: nn.Module) -> bool:
    """Whether `experts_forward` computes what this module does: it follows transformers' interface for experts, its
    weights (experts, out, in) without biases."""
    flags = {name: getattr(module, name, None) for name in ("is_transposed", "has_bias", "has_post_expert_norm")}
    return list(flags.values()) == [False] * len(flags) and all(
        isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in stacked(module).values()
    )


def stacked(module: nn.Module) -> dict[str, Any]:
    """The 3-D weights of an experts module by name."""
    names = [name for name in WEIGHTS if name in module._parameters]
    return {name: module._parameters[name] for name in names}


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' own sum over experts, each of which sees its tokens at once; weights are `ExpertStack`.

    Args:
        hidden_states: (T, hidden). top_k_index, top_k_weights: (T, k); an index beyond the experts is none.

    Returns:
        (T, hidden) in the dtype of `hidden_states`.
    """
    first = self.gate_up_proj if self.has_gate else self.up_proj
    result = torch.zeros_like(hidden_states)
    for number in top_k_index.unique().tolist():
        if number >= len(first):
            continue
        token, place = torch.where(top_k_index == number)
        y = first(hidden_states[token], number)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = self.down_proj(y, number) * top_k_weights[token, place, None]
        result = result.index_add(0, token, y.to(result.dtype))
    return result


def use_expert_stacks(model: Any) -> None:
    """Have `model`, whose experts' weights are `ExpertStack`, compute with them."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    model.config._experts_implementation = NAME
