"""Root-mean-square norms: of rows, of rows after a residual sum, and of the query and key heads of packed rows.

All arithmetic is float32 with one rounding to the result's type; `offset` is 1 for Gemma, whose weights lie around 0,
and 0 for the others. The weight is frozen: it gets no gradient; it may be of another dtype than x. The backward
passes take rstd = 1 / sqrt(mean(x^2) + eps), float32, and x itself: of x, the output says nothing where a weight is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.abi import DTYPES

_HEADS = "Tensor q_weight, Tensor k_weight"

torch.library.define("halfbyte::rms_norm", "(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)")
torch.library.define(
    "halfbyte::add_rms_norm",
    "(Tensor x, Tensor delta, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "halfbyte::rms_norm_backward",
    "(Tensor g, Tensor x, Tensor weight, Tensor rstd, float offset, Tensor? add) -> Tensor",
)
torch.library.define(
    "halfbyte::rms_norm_heads",
    f"(Tensor qkv, {_HEADS}, int heads, int kv_heads, float eps, float offset) -> (Tensor, Tensor)",
)
torch.library.define(
    "halfbyte::rms_norm_heads_backward_",
    f"(Tensor(a!) dqkv, Tensor qkv, {_HEADS}, Tensor rstd, int heads, int kv_heads, float offset) -> ()",
)


def _check(x: Tensor, weight: Tensor, *others: Tensor | None, rstd: Tensor | None = None) -> None:
    """x (..., n), weight (n,), `others` as x, rstd (...)."""
    torch._check(x.dtype in DTYPES and weight.dtype in DTYPES, lambda: f"no norm of {x.dtype} with {weight.dtype}")
    torch._check(x.dim() > 0 and weight.shape == x.shape[-1:], lambda: f"weight {weight.shape} for rows {x.shape}")
    for other in others:
        torch._check(
            other is None or (other.shape == x.shape and other.dtype == x.dtype),
            lambda: f"operands differ from x, {x.dtype} {x.shape}",
        )
    torch._check(
        rstd is None or (rstd.shape == x.shape[:-1] and rstd.dtype == torch.float32),
        lambda: f"rstd must be float32 {x.shape[:-1]}",
    )


def _check_heads(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int) -> None:
    """qkv (T, (heads + 2 kv_heads) * head_dim), both weights (head_dim,) of one dtype."""
    torch._check(
        qkv.dtype in DTYPES and q_weight.dtype in DTYPES and q_weight.dtype == k_weight.dtype,
        lambda: f"no norm of {qkv.dtype} with {q_weight.dtype} and {k_weight.dtype}",
    )
    torch._check(
        qkv.dim() == 2 and q_weight.dim() == 1 and q_weight.shape == k_weight.shape and heads >= 0 and kv_heads >= 0
        and qkv.shape[1] == (heads + 2 * kv_heads) * q_weight.shape[0],
        lambda: f"{heads} + 2 * {kv_heads} heads of {q_weight.shape} and {k_weight.shape} are not rows of {qkv.shape}",
    )  # fmt: skip


def _head_scale(q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The weights of the heads that are normed: (heads + kv_heads, head_dim)."""
    return torch.cat([q_weight.expand(heads, -1), k_weight.expand(kv_heads, -1)]).float()


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


def plain_rms_norm_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    _check_heads(qkv, q_weight, k_weight, heads, kv_heads)
    out = qkv.contiguous().clone()
    head_dim, normed = q_weight.shape[0], heads + kv_heads
    part = out.view(-1, normed + kv_heads, head_dim)[:, :normed]
    wide = part.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    part.copy_(wide * rstd.unsqueeze(-1) * (offset + _head_scale(q_weight, k_weight, heads, kv_heads)))
    return out, rstd


torch.library.impl("halfbyte::rms_norm_heads", "CompositeExplicitAutograd", plain_rms_norm_heads)


@torch.library.register_fake("halfbyte::rms_norm_heads")
def _rms_norm_heads_fake(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    _check_heads(qkv, q_weight, k_weight, heads, kv_heads)
    return qkv.new_empty(qkv.shape), qkv.new_empty((qkv.shape[0], heads + kv_heads), dtype=torch.float32)


def plain_rms_norm_heads_backward_(
    dqkv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rstd: Tensor, heads: int, kv_heads: int,
    offset: float,
) -> None:  # fmt: skip
    _check_heads_backward(dqkv, qkv, q_weight, k_weight, rstd, heads, kv_heads)
    normed, shape = heads + kv_heads, (heads + 2 * kv_heads, q_weight.shape[0])
    part, scale = dqkv.unflatten(1, shape)[:, :normed], rstd.unsqueeze(-1)
    unit = qkv.unflatten(1, shape)[:, :normed].float() * scale
    scaled = part.float() * (offset + _head_scale(q_weight, k_weight, heads, kv_heads))
    part.copy_(scale * (scaled - unit * (scaled * unit).mean(-1, keepdim=True)))


torch.library.impl("halfbyte::rms_norm_heads_backward_", "CompositeExplicitAutograd", plain_rms_norm_heads_backward_)


@torch.library.register_fake("halfbyte::rms_norm_heads_backward_")
def _rms_norm_heads_backward_fake(
    dqkv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rstd: Tensor, heads: int, kv_heads: int,
    offset: float,
) -> None:  # fmt: skip
    _check_heads_backward(dqkv, qkv, q_weight, k_weight, rstd, heads, kv_heads)


def _check_heads_backward(
    dqkv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rstd: Tensor, heads: int, kv_heads: int
) -> None:
    _check_heads(qkv, q_weight, k_weight, heads, kv_heads)
    torch._check(
        dqkv.shape == qkv.shape and dqkv.dtype == qkv.dtype,
        lambda: f"the gradient is {dqkv.dtype} {dqkv.shape}, qkv {qkv.dtype} {qkv.shape}",
    )
    torch._check(
        rstd.dtype == torch.float32 and rstd.shape == (qkv.shape[0], heads + kv_heads),
        lambda: f"rstd must be float32 ({qkv.shape[0]}, {heads + kv_heads})",
    )
