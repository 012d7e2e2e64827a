"""Rotary position embedding of packed query, key and value rows, in place.

transformers' "rotate_half" convention: element i of a head turns with element i + rotary_dim / 2. Phi-3's partial
rotary is a rotary_dim below head_dim: the rest of each head stays as it is. Float32 arithmetic, one rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.abi import DTYPES
from halfbyte.kernels.registry import run_native

torch.library.define(
    "halfbyte::rope_", "(Tensor(a!) qkv, Tensor cos, Tensor sin, int heads, int head_dim, bool inverse) -> ()"
)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int) -> None:
    """qkv (T, at least heads * head_dim), cos and sin (T, rotary_dim), rotary_dim even, <= head_dim; ValueError."""
    if qkv.dtype not in DTYPES or cos.dtype not in DTYPES or sin.dtype != cos.dtype:
        raise ValueError(f"no rotation of {qkv.dtype} by {cos.dtype} and {sin.dtype}")
    if cos.dim() != 2 or sin.shape != cos.shape or cos.shape[1] % 2 or cos.shape[1] > head_dim:
        raise ValueError(f"cos {cos.shape} and sin {sin.shape} are not (T, rotary_dim) for heads of {head_dim}")
    if qkv.dim() != 2 or qkv.shape[0] != cos.shape[0] or heads < 0 or heads * head_dim > qkv.shape[1]:
        raise ValueError(f"rows of {qkv.shape} have no {heads} heads of {head_dim}, or other tokens than {cos.shape}")


def plain_rope_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, inverse: bool) -> None:
    _check(qkv, cos, sin, heads, head_dim)
    rotary_dim = cos.shape[1]
    part = qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))[..., :rotary_dim]
    wide, cos, sin = part.float(), cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    half = rotary_dim // 2
    if inverse:  # the transposed rotation: the sines act before the halves change places
        wide_sin = wide * sin
        part.copy_(wide * cos + torch.cat((wide_sin[..., half:], -wide_sin[..., :half]), dim=-1))
    else:
        part.copy_(wide * cos + torch.cat((-wide[..., half:], wide[..., :half]), dim=-1) * sin)


torch.library.impl("halfbyte::rope_", "CompositeExplicitAutograd", plain_rope_)


@torch.library.register_fake("halfbyte::rope_")
def _rope_fake(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, inverse: bool) -> None:
    _check(qkv, cos, sin, heads, head_dim)


@torch.library.impl("halfbyte::rope_", "CPU")
def _rope_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, inverse: bool) -> None:
    _check(qkv, cos, sin, heads, head_dim)
    cos, sin = cos.contiguous(), sin.contiguous()
    done = qkv.is_contiguous() and run_native(
        "hb_rope", qkv.data_ptr(), DTYPES[qkv.dtype], cos.data_ptr(), sin.data_ptr(), DTYPES[cos.dtype], *qkv.shape,
        heads, head_dim, cos.shape[1], inverse,
    )  # fmt: skip
    if not done:
        plain_rope_(qkv, cos, sin, heads, head_dim, inverse)
