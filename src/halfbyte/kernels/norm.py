"""Root-mean-square norms of rows, alone or after a residual sum.

All arithmetic is float32 with one rounding to the result's type; `offset` is 1 for Gemma, whose weights lie around 0,
and 0 for the others. The weight is frozen: it gets no gradient; it may be of another dtype than x. The backward
passes take rstd = 1 / sqrt(mean(x^2) + eps), float32, and x itself: of x, the output says nothing where a weight is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.abi import DTYPES
from halfbyte.kernels.buffers import empty_like
from halfbyte.kernels.registry import run_native

torch.library.define("halfbyte::rms_norm", "(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)")
torch.library.define(
    "halfbyte::add_rms_norm",
    "(Tensor x, Tensor delta, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "halfbyte::rms_norm_backward",
    "(Tensor g, Tensor x, Tensor weight, Tensor rstd, float offset, Tensor? add) -> Tensor",
)


def _check(x: Tensor, weight: Tensor, *others: Tensor | None, rstd: Tensor | None = None) -> None:
    """x (..., n), weight (n,), `others` as x, rstd (...). Raises ValueError."""
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise ValueError(f"no norm of {x.dtype} with {weight.dtype}")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {weight.shape} for rows {x.shape}")
    for other in others:
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
            raise ValueError(f"{other.dtype} {other.shape} beside x {x.dtype} {x.shape}")
    if rstd is not None and (rstd.shape != x.shape[:-1] or rstd.dtype != torch.float32):
        raise ValueError(f"rstd {rstd.dtype} {rstd.shape} for rows {x.shape}; it is float32")


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    _check(x, weight)
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * rstd.unsqueeze(-1) * (offset + weight.float())).to(x.dtype), rstd


torch.library.impl("halfbyte::rms_norm", "CompositeExplicitAutograd", plain_rms_norm)


@torch.library.register_fake("halfbyte::rms_norm")
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    _check(x, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def plain_add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, delta)
    total = x + delta
    return (total, *plain_rms_norm(total, weight, eps, offset))


torch.library.impl("halfbyte::add_rms_norm", "CompositeExplicitAutograd", plain_add_rms_norm)


@torch.library.register_fake("halfbyte::add_rms_norm")
def _add_rms_norm_fake(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, delta)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def plain_rms_norm_backward(
    g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, add: Tensor | None
) -> Tensor:
    _check(x, weight, g, add, rstd=rstd)
    scale = rstd.unsqueeze(-1)
    normed, scaled = x.float() * scale, g.float() * (offset + weight.float())
    dx = scale * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (dx if add is None else dx + add.float()).to(x.dtype)


torch.library.impl("halfbyte::rms_norm_backward", "CompositeExplicitAutograd", plain_rms_norm_backward)


@torch.library.register_fake("halfbyte::rms_norm_backward")
def _rms_norm_backward_fake(
    g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, add: Tensor | None
) -> Tensor:
    _check(x, weight, g, add, rstd=rstd)
    return x.new_empty(x.shape)


# The CPU implementations: the library where it has one for the instruction set in use, else the specification.


def _norm_on_cpu(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The sum (x itself without `delta`), its norm, rstd; None where the library does not serve."""
    _check(x, weight, delta)
    x, weight = x.contiguous(), weight.contiguous()
    y, rstd = empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total, addend, place = x, None, None
    if delta is not None:
        delta, total = delta.contiguous(), empty_like(x)
        addend, place = delta.data_ptr(), total.data_ptr()
    done = run_native(
        "hb_rms_norm", x.data_ptr(), addend, weight.data_ptr(), DTYPES[x.dtype], DTYPES[weight.dtype], rstd.numel(),
        x.shape[-1], eps, offset, place, y.data_ptr(), rstd.data_ptr(),
    )  # fmt: skip
    return (total, y, rstd) if done else None


@torch.library.impl("halfbyte::rms_norm", "CPU")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    result = _norm_on_cpu(x, None, weight, eps, offset)
    return plain_rms_norm(x, weight, eps, offset) if result is None else result[1:]


@torch.library.impl("halfbyte::add_rms_norm", "CPU")
def _add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_on_cpu(x, delta, weight, eps, offset) or plain_add_rms_norm(x, delta, weight, eps, offset)


@torch.library.impl("halfbyte::rms_norm_backward", "CPU")
def _rms_norm_backward(
    g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, add: Tensor | None
) -> Tensor:
    _check(x, weight, g, add, rstd=rstd)
    g, x, weight, rstd = g.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
    add = None if add is None else add.contiguous()
    dx = empty_like(x)
    done = run_native(
        "hb_rms_norm_backward", g.data_ptr(), x.data_ptr(), weight.data_ptr(), DTYPES[x.dtype], DTYPES[weight.dtype],
        rstd.data_ptr(), None if add is None else add.data_ptr(), rstd.numel(), x.shape[-1], offset, dx.data_ptr(),
    )  # fmt: skip
    return dx if done else plain_rms_norm_backward(g, x, weight, rstd, offset, add)
