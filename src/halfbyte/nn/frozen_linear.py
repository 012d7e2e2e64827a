"""FrozenLinear: a frozen linear layer in whatever dtype its input has, without a second copy of its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import halfbyte.kernels  # noqa: F401  (registers the operators)


class FrozenLinear(nn.Linear):
    """A linear layer that keeps its weight in the dtype it came in and computes in that of its input.

    For what is not in 4 bits: the output head, `skip_modules`. Shares the given weight, so tied heads stay tied.
    With `scales` the weight is int8 (quant/int8.py).
    """

    scales: Tensor | None

    def __init__(self, weight: nn.Parameter, bias: Tensor | None = None, scales: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `x`."""
        y: Tensor = torch.ops.halfbyte.linear_frozen(x, self.weight, self.bias, self.scales)
        return y
