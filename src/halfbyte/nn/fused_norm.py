"""The last norm of a model as one function each way, in the place of transformers' own, over the same weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.nn.layer_spec import Norm, rms_norm

ops = torch.ops.halfbyte


class FusedNorm(nn.Module):
    """In the place of an RMSNorm whose weight is frozen; calls it where that is not so (any more)."""

    def __init__(self, plain: nn.Module, norm: Norm) -> None:
        super().__init__()
        self.__dict__["_plain"] = plain  # not a child: the weight keeps its name
        self._parameters = plain._parameters
        self._norm = norm

    @property
    def plain(self) -> nn.Module:
        """The norm that this one stands for."""
        norm: nn.Module = self.__dict__["_plain"]
        return norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., n) -> (..., n), of the input's dtype."""
        if self._norm.weight.requires_grad or torch.is_autocast_enabled(hidden_states.device.type):
            y: Tensor = self.plain(hidden_states)
            return y
        return _RmsNorm.apply(hidden_states, self._norm)  # type: ignore[no-any-return,no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    """Saves the input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        x = x.contiguous()
        y, rstd = ops.rms_norm(x, norm.weight, norm.eps, norm.offset)
        ctx.save_for_backward(x, rstd)
        ctx.norm = norm
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, rstd = ctx.saved_tensors
        norm = ctx.norm
        dx: Tensor = ops.rms_norm_backward(grads[0].contiguous(), x, norm.weight, rstd, norm.offset, None)
        return dx, None


def fused_norm(module: nn.Module | None) -> FusedNorm | None:
    """`module` as one function each way, if it is an RMSNorm on which nobody has put a hook."""
    if module is None or isinstance(module, FusedNorm) or module._forward_hooks or module._forward_pre_hooks:
        return None
    norm = rms_norm(module)
    return None if norm is None else FusedNorm(module, norm)
