"""Packed attention on a GPU: torch's FlashAttention over sequences of different lengths, no mask, no padding.

For 16-bit heads of up to 256 on Ampere and newer; everything else is the specification's, which holds one sequence's
scores at a time. A sequence that goes on from others gets their keys and values beside its own. Importing this module
registers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from halfbyte.kernels.attention import (
    _check_backward,
    _head_dim,
    _key_starts,
    _sequences,
    plain_packed_attention,
    plain_packed_attention_backward,
)

MOST_HEAD_DIM = 256
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class _Layout:
    """Where sequences and their keys lie, on the device; `key_rows`: the row of each key, None: they are the rows.

    `no_random` and `nothing` are the state of dropout's random numbers, of which there are none.
    """

    starts: Tensor
    key_starts: Tensor
    longest: int
    most_keys: int
    key_rows: Tensor | None
    no_random: Tensor
    nothing: Tensor


@lru_cache(maxsize=4)
def _layout(starts: tuple[int, ...], parents: tuple[int, ...] | None, device: torch.device) -> _Layout:
    """Kept, since all layers of a pass ask for the same one and each upload takes a launch."""
    host = torch.tensor(starts, dtype=torch.int32)
    above = None if parents is None else torch.tensor(parents, dtype=torch.int32)
    keys = _key_starts(host, above, starts[-1])
    rows = None
    if above is not None:
        rows = torch.cat([keys for _, keys in _sequences(host, above, torch.empty(starts[-1], 0))]).to(device)
    moved = host.to(device)
    return _Layout(
        moved, moved if rows is None else torch.tensor(keys, dtype=torch.int32).to(device),
        max(stop - start for start, stop in pairwise(starts)), max(b - a for a, b in pairwise(keys)), rows,
        torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device),
    )  # fmt: skip


def flash_serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's FlashAttention knows heads of this kind on this device."""
    known = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= MOST_HEAD_DIM
    return known and device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def _split(qkv: Tensor, heads: int, kv_heads: int, layout: _Layout) -> list[Tensor]:
    """q (T, heads, D), k and v (keys, kv_heads, D), views where every key is a row."""
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=1)
    return [q, k, v] if layout.key_rows is None else [q, k[layout.key_rows], v[layout.key_rows]]


def _found(seq_starts: Tensor, parents: Tensor | None, qkv: Tensor) -> _Layout:
    before = None if parents is None else tuple(parents.tolist())
    starts = tuple(seq_starts.tolist())
    torch._check(starts[-1] == qkv.shape[0], lambda: f"seq_starts must rise from 0 to {qkv.shape[0]}")
    return _layout(starts, before, qkv.device)


def _window(window: int) -> dict[str, int | None]:
    return {"window_size_left": window - 1 if window else None, "window_size_right": 0 if window else None}


def packed_attention(
    qkv: Tensor, heads: int, kv_heads: int, seq_starts: Tensor, scale: float, window: int,
    parents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    head_dim = _head_dim(qkv, heads, kv_heads, seq_starts, window, parents)
    if not flash_serves(qkv.device, qkv.dtype, head_dim) or not qkv.shape[0]:
        return plain_packed_attention(qkv, heads, kv_heads, seq_starts, scale, window, parents)
    layout = _found(seq_starts, parents, qkv)
    q, k, v = _split(qkv.contiguous(), heads, kv_heads, layout)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, layout.starts, layout.key_starts, layout.longest, layout.most_keys, 0.0, True, False, scale=scale,
        **_window(window),
    )  # fmt: skip
    return out.flatten(1), lse


def packed_attention_backward(
    g: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, kv_heads: int, seq_starts: Tensor, scale: float,
    window: int, parents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same from run to run: gradients of keys that several sequences see are added in a fixed order."""
    case = (heads, kv_heads, seq_starts, scale, window, parents)
    head_dim = _head_dim(qkv, heads, kv_heads, seq_starts, window, parents)
    _check_backward(g, qkv, out, lse, heads, head_dim)
    if not flash_serves(qkv.device, qkv.dtype, head_dim) or not qkv.shape[0]:
        return plain_packed_attention_backward(g, qkv, out, lse, *case)
    layout = _found(seq_starts, parents, qkv)
    q, k, v = _split(qkv.contiguous(), heads, kv_heads, layout)
    with _deterministic():
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            g.contiguous().view_as(q), q, k, v, out.contiguous().view_as(q), lse.contiguous(), layout.starts,
            layout.key_starts, layout.longest, layout.most_keys, 0.0, True,
            layout.no_random, layout.nothing, scale=scale, **_window(window),
        )  # fmt: skip
    if layout.key_rows is not None:
        shared = torch.zeros(qkv.shape[0], 2 * kv_heads, head_dim, device=qkv.device)
        shared.index_put_((layout.key_rows,), torch.cat([dk, dv], 1).float(), accumulate=True)
        dk, dv = shared.to(qkv.dtype).chunk(2, dim=1)
    return torch.cat([dq, dk, dv], 1).flatten(1)


@contextmanager
def _deterministic() -> Iterator[None]:
    """FlashAttention adds up dq with atomics unless torch is told otherwise."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


for _operator in (packed_attention, packed_attention_backward):
    torch.library.impl(f"halfbyte::{_operator.__name__}", "CUDA", _operator)
