"""Root-mean-square norms of each query and key head of packed rows (Qwen3's and Gemma 3's q_norm and k_norm).

A row is `heads` queries, `kv_heads` keys and `kv_heads` values, each of head_dim numbers; values pass as they are. The
arithmetic is that of `norm`. The forward pass makes new rows, because the backward pass needs the old ones; the
backward pass works in the gradient's place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.abi import DTYPES
from halfbyte.kernels.buffers import empty_like
from halfbyte.kernels.registry import run_native

_WEIGHTS = "Tensor q_weight, Tensor k_weight"

torch.library.define(
    "halfbyte::rms_norm_heads",
    f"(Tensor qkv, {_WEIGHTS}, int heads, int kv_heads, float eps, float offset) -> (Tensor, Tensor)",
)
torch.library.define(
    "halfbyte::rms_norm_heads_backward_",
    f"(Tensor(a!) dqkv, Tensor qkv, {_WEIGHTS}, Tensor rstd, int heads, int kv_heads, float offset) -> ()",
)


def _check(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int) -> None:
    """qkv (T, (heads + 2 kv_heads) * head_dim), both weights (head_dim,) of one dtype. Raises ValueError."""
    if qkv.dtype not in DTYPES or q_weight.dtype not in DTYPES or k_weight.dtype != q_weight.dtype:
        raise ValueError(f"no norm of {qkv.dtype} with {q_weight.dtype} and {k_weight.dtype}")
    if q_weight.dim() != 1 or k_weight.shape != q_weight.shape:
        raise ValueError(f"weights {q_weight.shape} and {k_weight.shape} are not of one head_dim")
    width = (heads + 2 * kv_heads) * q_weight.shape[0]
    if qkv.dim() != 2 or qkv.shape[1] != width or heads < 0 or kv_heads < 0:
        raise ValueError(f"rows of {qkv.shape} are not {heads} + 2 * {kv_heads} heads of {q_weight.shape[0]}")


def _check_backward(
    dqkv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rstd: Tensor, heads: int, kv_heads: int
) -> None:
    _check(qkv, q_weight, k_weight, heads, kv_heads)
    if dqkv.shape != qkv.shape or dqkv.dtype != qkv.dtype:
        raise ValueError(f"the gradient is {dqkv.dtype} {dqkv.shape}, qkv {qkv.dtype} {qkv.shape}")
    if rstd.dtype != torch.float32 or rstd.shape != (qkv.shape[0], heads + kv_heads):
        raise ValueError(f"rstd {rstd.dtype} {rstd.shape}; it is float32 ({qkv.shape[0]}, {heads + kv_heads})")


def _head_scale(q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The weights of the heads that are normed: (heads + kv_heads, head_dim)."""
    return torch.cat([q_weight.expand(heads, -1), k_weight.expand(kv_heads, -1)]).float()


def plain_rms_norm_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    _check(qkv, q_weight, k_weight, heads, kv_heads)
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
    _check(qkv, q_weight, k_weight, heads, kv_heads)
    return qkv.new_empty(qkv.shape), qkv.new_empty((qkv.shape[0], heads + kv_heads), dtype=torch.float32)


def plain_rms_norm_heads_backward_(
    dqkv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rstd: Tensor, heads: int, kv_heads: int,
    offset: float,
) -> None:  # fmt: skip
    _check_backward(dqkv, qkv, q_weight, k_weight, rstd, heads, kv_heads)
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
    _check_backward(dqkv, qkv, q_weight, k_weight, rstd, heads, kv_heads)


@torch.library.impl("halfbyte::rms_norm_heads", "CPU")
def _rms_norm_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    _check(qkv, q_weight, k_weight, heads, kv_heads)
    qkv, q_weight, k_weight = qkv.contiguous(), q_weight.contiguous(), k_weight.contiguous()
    out, rstd = empty_like(qkv), torch.empty(qkv.shape[0], heads + kv_heads, dtype=torch.float32)
    done = run_native(
        "hb_rms_norm_heads", qkv.data_ptr(), q_weight.data_ptr(), k_weight.data_ptr(), DTYPES[qkv.dtype],
        DTYPES[q_weight.dtype], qkv.shape[0], heads, kv_heads, q_weight.shape[0], eps, offset, out.data_ptr(),
        rstd.data_ptr(),
    )  # fmt: skip
    return (out, rstd) if done else plain_rms_norm_heads(qkv, q_weight, k_weight, heads, kv_heads, eps, offset)


@torch.library.impl("halfbyte::rms_norm_heads_backward_", "CPU")
def _rms_norm_heads_backward_(
    dqkv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rstd: Tensor, heads: int, kv_heads: int,
    offset: float,
) -> None:  # fmt: skip
    _check_backward(dqkv, qkv, q_weight, k_weight, rstd, heads, kv_heads)
    qkv, q_weight, k_weight, rstd = qkv.contiguous(), q_weight.contiguous(), k_weight.contiguous(), rstd.contiguous()
    done = dqkv.is_contiguous() and run_native(
        "hb_rms_norm_heads_backward", dqkv.data_ptr(), qkv.data_ptr(), q_weight.data_ptr(), k_weight.data_ptr(),
        DTYPES[qkv.dtype], DTYPES[q_weight.dtype], rstd.data_ptr(), qkv.shape[0], heads, kv_heads, q_weight.shape[0],
        offset,
    )  # fmt: skip
    if not done:
        plain_rms_norm_heads_backward_(dqkv, qkv, q_weight, k_weight, rstd, heads, kv_heads, offset)
