"""Clipping by the norm of all gradients together."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from halfbyte.errors import NumericsError


def clip_grad_norm(params: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients by one factor, in place, so that their common L2 norm is at most `max_norm`.

    Norms are taken in fp32 whatever the gradients' dtype. The factor is max_norm / (norm + 1e-6), as in torch.

    Args:
        params: parameters of any shape, dtype and device; those without a gradient do not count.
        max_norm: the largest norm; 0 measures and changes nothing.

    Returns:
        The norm before clipping.

    Raises:
        NumericsError: the norm is not finite; the gradients are as they were.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return 0.0
    norms = [each.to(grads[0].device) for each in torch._foreach_norm(grads, 2, dtype=torch.float32)]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if not math.isfinite(norm):
        bad = sum(not math.isfinite(float(each)) for each in norms)
        raise NumericsError(
            f"the gradients' norm is {norm}, {bad} of {len(grads)} tensors are not finite",
            fix="Lower optim.lr, or look for the sample that causes it",
        )
    if 0 < max_norm < norm + 1e-6:
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
    return norm
