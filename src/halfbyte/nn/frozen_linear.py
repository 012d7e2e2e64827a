"""FrozenLinear: a frozen 16-bit linear layer in a wider compute dtype, without a wider copy of its weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PANEL_BYTES = 8 * 2**20
"""Largest piece of the weight that is held in the compute dtype at a time."""


class _PanelLinear(torch.autograd.Function):
    """``x @ weight^T``, `weight` cast panel by panel in forward and again in backward; saves `weight` as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for rows in _panels(weight, x.dtype):
            y[..., rows] = x @ weight[rows].to(x.dtype).T
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        grad_x = grad.new_zeros(*grad.shape[:-1], weight.shape[1])
        for rows in _panels(weight, grad.dtype):
            grad_x += grad[..., rows] @ weight[rows].to(grad.dtype)
        return grad_x, None


def _panels(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    rows = max(PANEL_BYTES // (weight.shape[1] * dtype.itemsize), 1)
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


class FrozenLinear(nn.Linear):
    """A linear layer that keeps its weight in the dtype it came in and computes in that of its input.

    For what stays unquantized: the output head, `skip_modules`. Shares the given weight, so tied heads stay tied.
    """

    def __init__(self, weight: nn.Parameter, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `x`."""
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = _PanelLinear.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(x.dtype)
