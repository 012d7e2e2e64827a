"""CUDA implementations of a decoder layer's elementwise operators and of the loss: one Triton kernel each.

Cases the kernels do not know, and machines without Triton, get the plain-torch specifications, which run on the GPU as
well, in many passes. Importing this module registers them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels import cross_entropy, gated, norm, rope
from halfbyte.kernels.registry import cuda_choice

MOST_COLUMNS = 1 << 15
"""Of a row that a norm's program holds at once."""


def _by_triton(rows: Tensor) -> bool:
    return "triton" in cuda_choice().kernels and rows.shape[-1] <= MOST_COLUMNS


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    norm._check(x, weight)
    if not _by_triton(x):
        return norm.plain_rms_norm(x, weight, eps, offset)
    from halfbyte.kernels.triton import layer

    _, out, rstd = layer.rms_norm(x, None, weight, eps, offset)
    return out, rstd


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    norm._check(x, weight, delta)
    if not _by_triton(x):
        return norm.plain_add_rms_norm(x, delta, weight, eps, offset)
    from halfbyte.kernels.triton import layer

    total, out, rstd = layer.rms_norm(x, delta, weight, eps, offset)
    return total, out, rstd


def rms_norm_backward(
    g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, add: Tensor | None
) -> Tensor:  # fmt: skip
    norm._check(x, weight, g, add, rstd=rstd)
    if not _by_triton(x):
        return norm.plain_rms_norm_backward(g, x, weight, rstd, offset, add)
    from halfbyte.kernels.triton import layer

    return layer.rms_norm_backward(g, x, weight, rstd, offset, add)


def gated_(gate_up: Tensor, activation: str) -> Tensor:
    gated._check(gate_up, activation)
    if "triton" not in cuda_choice().kernels:
        return gated.plain_gated(gate_up, activation)
    from halfbyte.kernels.triton import layer

    return layer.gated(gate_up, activation)


def gated_backward(g: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    gated._check(gate_up, activation, g)
    if "triton" not in cuda_choice().kernels:
        return gated.plain_gated_backward(g, gate_up, activation)
    from halfbyte.kernels.triton import layer

    return layer.gated_backward(g, gate_up, activation)


def rope_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, inverse: bool) -> None:
    rope._check(qkv, cos, sin, heads, head_dim)
    if "triton" not in cuda_choice().kernels or qkv.stride(1) != 1:
        rope.plain_rope_(qkv, cos, sin, heads, head_dim, inverse)
        return
    from halfbyte.kernels.triton import layer

    layer.rope_(qkv, cos, sin, heads, head_dim, inverse=inverse)


def softmax_cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """As the specification, but a target out of range gives NaN: to look would wait for the GPU."""
    cross_entropy._check(logits, targets)
    if "triton" not in cuda_choice().kernels or logits.dtype == torch.float64 or not logits.is_contiguous():
        return cross_entropy.plain_softmax_cross_entropy_(logits, targets)
    from halfbyte.kernels.triton import loss

    return loss.softmax_cross_entropy_(logits, targets)


for _name, _operator in (
    ("rms_norm", rms_norm), ("add_rms_norm", add_rms_norm), ("rms_norm_backward", rms_norm_backward),
    ("gated", gated_), ("gated_backward", gated_backward), ("rope_", rope_),
    ("softmax_cross_entropy_", softmax_cross_entropy_),
):  # fmt: skip
    torch.library.impl(f"halfbyte::{_name}", "CUDA", _operator)
