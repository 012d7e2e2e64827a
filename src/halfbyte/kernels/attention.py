"""Causal attention of sequences laid end to end, forward and backward, straight from the packed projection.

A sequence may go on from another one, its parent: before their own keys its tokens then see all that the parent's last
token sees. So what several samples begin with need stand there only once. A sequence directly follows its parent or
something that goes on from that.

The plain-torch default below is the specification. It holds one sequence's scores at a time; the CPU kernels
(csrc/attention.inl) hold none.
"""

from __future__ import annotations

import ctypes as ct
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.abi import DTYPES, Packed
from halfbyte.kernels.buffers import empty, empty_like
from halfbyte.kernels.registry import cpu_choice, run_native

_ARGUMENTS = "int heads, int kv_heads, Tensor seq_starts, float scale, int window, Tensor? parents=None"
"""seq_starts: int32 (sequences + 1), cumulative lengths. parents: int32 (sequences), -1 for a sequence without one."""

torch.library.define("halfbyte::packed_attention", f"(Tensor qkv, {_ARGUMENTS}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "halfbyte::packed_attention_backward",
    f"(Tensor g, Tensor qkv, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor dqkv",
)


def _head_dim(qkv: Tensor, heads: int, kv_heads: int, seq_starts: Tensor, window: int, parents: Tensor | None) -> int:
    """Checks everything that shapes say. Raises RuntimeError."""
    torch._check(qkv.dim() == 2 and qkv.is_floating_point(), lambda: f"qkv is {qkv.dtype} {tuple(qkv.shape)}")
    torch._check(
        kv_heads > 0 and heads > 0 and heads % kv_heads == 0, lambda: f"{heads} heads over {kv_heads} key heads"
    )
    columns, all_heads = qkv.shape[1], heads + 2 * kv_heads
    torch._check(
        columns > 0 and columns % all_heads == 0, lambda: f"{columns} columns for {heads} + 2 * {kv_heads} heads"
    )
    torch._check(
        seq_starts.dtype == torch.int32 and seq_starts.dim() == 1 and seq_starts.numel() > 0,
        lambda: f"seq_starts is {seq_starts.dtype} {tuple(seq_starts.shape)}, not int32 (sequences + 1)",
    )
    torch._check(
        parents is None or (parents.dtype == torch.int32 and parents.shape == seq_starts[1:].shape),
        lambda: "parents is not int32 (sequences)",
    )
    torch._check(window >= 0, lambda: f"a window of {window}")
    return columns // all_heads


def _check_backward(g: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, head_dim: int) -> None:
    shape = (qkv.shape[0], heads * head_dim)
    torch._check(g.shape == shape and out.shape == shape, lambda: f"g, out are not {shape}")
    torch._check(g.dtype == qkv.dtype and out.dtype == qkv.dtype, lambda: f"g, out are not {qkv.dtype}")
    torch._check(
        lse.shape == (heads, qkv.shape[0]) and lse.dtype == _wide(qkv), lambda: f"lse is not {_wide(qkv)} (heads, T)"
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _key_starts(seq_starts: Tensor, parents: Tensor | None, tokens: int) -> list[int]:
    """(sequences + 1) cumulative numbers of keys: a sequence's own, and all that it goes on from.

    Raises:
        RuntimeError: seq_starts does not rise from 0 to `tokens`, or a sequence is not where its parent says.
    """
    starts: list[int] = seq_starts.tolist()
    rising = starts[0] == 0 and starts[-1] == tokens and all(a <= b for a, b in pairwise(starts))
    torch._check(rising, lambda: f"seq_starts must rise from 0 to {tokens}")
    if parents is None:
        return starts
    keys = [0]
    line: list[int] = []  # ends with the last sequence; before each stands its parent
    for s, parent in enumerate(parents.tolist()):
        while line and line[-1] != parent:
            line.pop()
        if not line and parent != -1:
            raise RuntimeError(f"sequence {s} does not follow its parent {parent}")
        seen = keys[parent + 1] - keys[parent] if line else 0
        keys.append(keys[-1] + seen + starts[s + 1] - starts[s])
        line.append(s)
    return keys


def _sequences(seq_starts: Tensor, parents: Tensor | None, qkv: Tensor) -> list[tuple[slice, Tensor]]:
    """Each sequence's rows, and the rows of the keys that its last one sees. Raises as `_key_starts`."""
    _key_starts(seq_starts, parents, qkv.shape[0])
    above = [-1] * (seq_starts.numel() - 1) if parents is None else parents.tolist()
    found: list[tuple[slice, Tensor]] = []
    for (start, stop), parent in zip(pairwise(seq_starts.tolist()), above, strict=True):
        own = torch.arange(start, stop, device=qkv.device)
        found.append((slice(start, stop), own if parent < 0 else torch.cat([found[parent][1], own])))
    return found


def _split(rows: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n, (heads + 2 kv_heads) * D) -> q (kv_heads, group, n, D) and k, v (kv_heads, 1, n, D)."""
    head_dim = rows.shape[1] // (heads + 2 * kv_heads)
    q, k, v = rows.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    return (
        q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3),
        k.transpose(0, 1).unsqueeze(1),
        v.transpose(0, 1).unsqueeze(1),
    )


def _scores(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:
    """q k^T * scale, -inf where a key is after a query or out of its window; the last query is at the last key."""
    keys = torch.arange(k.shape[-2], device=q.device)
    behind = keys[k.shape[-2] - q.shape[-2] :, None] - keys
    hidden = (behind < 0) | (behind >= (window or k.shape[-2]))
    return (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)


def plain_packed_attention(
    qkv: Tensor, heads: int, kv_heads: int, seq_starts: Tensor, scale: float, window: int,
    parents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    head_dim, wide = _head_dim(qkv, heads, kv_heads, seq_starts, window, parents), _wide(qkv)
    out = qkv.new_empty(qkv.shape[0], heads * head_dim)
    lse = qkv.new_empty(heads, qkv.shape[0], dtype=wide)
    for rows, keys in _sequences(seq_starts, parents, qkv):
        q, _, _ = _split(qkv[rows].to(wide), heads, kv_heads)
        _, k, v = _split(qkv[keys].to(wide), heads, kv_heads)
        scores = _scores(q, k, scale, window)
        lse[:, rows] = scores.logsumexp(-1).flatten(0, 1)
        out[rows] = (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(1)
    return out, lse


def plain_packed_attention_backward(
    g: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, kv_heads: int, seq_starts: Tensor, scale: float,
    window: int, parents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    head_dim, wide = _head_dim(qkv, heads, kv_heads, seq_starts, window, parents), _wide(qkv)
    _check_backward(g, qkv, out, lse, heads, head_dim)
    dqkv = torch.zeros(qkv.shape, dtype=wide, device=qkv.device)
    dq, dk, dv = _split(dqkv, heads, kv_heads)
    for rows, keys in _sequences(seq_starts, parents, qkv):
        q, _, _ = _split(qkv[rows].to(wide), heads, kv_heads)
        _, k, v = _split(qkv[keys].to(wide), heads, kv_heads)
        dout, o = (x[rows].to(wide).view(-1, *q.shape[:2], head_dim).permute(1, 2, 0, 3) for x in (g, out))
        p = (_scores(q, k, scale, window) - lse[:, rows].view(*q.shape[:3], 1)).exp()
        ds = p * (dout @ v.transpose(-1, -2) - (dout * o).sum(-1, keepdim=True)) * scale
        dq[:, :, rows] = ds @ k
        dk.index_add_(2, keys, (ds.transpose(-1, -2) @ q).sum(1, keepdim=True))
        dv.index_add_(2, keys, (p.transpose(-1, -2) @ dout).sum(1, keepdim=True))
    return dqkv.to(qkv.dtype)


def attends_natively(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether kernels of our own serve the CPU for heads of this kind; if not, the specification does, slowly. For a
    GPU: `cuda_attention.flash_serves`."""
    library = cpu_choice().library
    return library is not None and dtype in DTYPES and library.attends(head_dim)


def _run(name: str, qkv: Tensor, heads: int, kv_heads: int, seq_starts: Tensor, scale: float, window: int,
         parents: Tensor | None, *tensors: Tensor) -> bool:  # fmt: skip
    """Let the library's function fill the last of `tensors`, all contiguous; False where it does not know the case."""
    key_starts = torch.tensor(_key_starts(seq_starts, parents, qkv.shape[0]), dtype=torch.int32)
    if qkv.dtype not in DTYPES:
        return False
    seq_starts, parents = seq_starts.contiguous(), key_starts if parents is None else parents.contiguous()
    packed = Packed(
        qkv.data_ptr(), seq_starts.data_ptr(), key_starts.data_ptr(), parents.data_ptr(), qkv.shape[0],
        seq_starts.numel() - 1, heads, kv_heads, qkv.shape[1] // (heads + 2 * kv_heads), window, scale,
        DTYPES[qkv.dtype],
    )  # fmt: skip
    return run_native(name, ct.addressof(packed), *(tensor.data_ptr() for tensor in tensors))


@torch.library.impl("halfbyte::packed_attention", "CPU")
def _packed_attention(
    qkv: Tensor, heads: int, kv_heads: int, seq_starts: Tensor, scale: float, window: int,
    parents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    head_dim = _head_dim(qkv, heads, kv_heads, seq_starts, window, parents)
    case = (heads, kv_heads, seq_starts, scale, window, parents)
    qkv = qkv.contiguous()
    out = empty((qkv.shape[0], heads * head_dim), qkv.dtype)
    lse = empty((heads, qkv.shape[0]), torch.float32)
    if _run("hb_attention", qkv, *case, out, lse):
        return out, lse
    return plain_packed_attention(qkv, *case)


@torch.library.impl("halfbyte::packed_attention_backward", "CPU")
def _packed_attention_backward(
    g: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, kv_heads: int, seq_starts: Tensor, scale: float,
    window: int, parents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_backward(g, qkv, out, lse, heads, _head_dim(qkv, heads, kv_heads, seq_starts, window, parents))
    case = (heads, kv_heads, seq_starts, scale, window, parents)
    g, qkv, out, lse = g.contiguous(), qkv.contiguous(), out.contiguous(), lse.contiguous()
    dqkv = empty_like(qkv)
    if _run("hb_attention_backward", qkv, *case, g, out, lse, dqkv):
        return dqkv
    return plain_packed_attention_backward(g, qkv, out, lse, *case)


torch.library.impl("halfbyte::packed_attention", "CompositeExplicitAutograd", plain_packed_attention)
torch.library.impl("halfbyte::packed_attention_backward", "CompositeExplicitAutograd", plain_packed_attention_backward)


@torch.library.register_fake("halfbyte::packed_attention")
def _packed_attention_fake(
    qkv: Tensor, heads: int, kv_heads: int, seq_starts: Tensor, scale: float, window: int,
    parents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    head_dim = _head_dim(qkv, heads, kv_heads, seq_starts, window, parents)
    return qkv.new_empty(qkv.shape[0], heads * head_dim), qkv.new_empty(heads, qkv.shape[0], dtype=_wide(qkv))


@torch.library.register_fake("halfbyte::packed_attention_backward")
def _packed_attention_backward_fake(
    g: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, kv_heads: int, seq_starts: Tensor, scale: float,
    window: int, parents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_backward(g, qkv, out, lse, heads, _head_dim(qkv, heads, kv_heads, seq_starts, window, parents))
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, heads, kv_heads, seq_starts, scale, window, parents = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output, seq_starts, parents)
    ctx.numbers = (heads, kv_heads, scale, window)


def _backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, out, lse, seq_starts, parents = ctx.saved_tensors
    heads, kv_heads, scale, window = ctx.numbers
    dqkv = torch.ops.halfbyte.packed_attention_backward(
        g.contiguous(), qkv, out, lse, heads, kv_heads, seq_starts, scale, window, parents
    )
    return dqkv, None, None, None, None, None, None


torch.library.register_autograd("halfbyte::packed_attention", _backward, setup_context=_save)
