"""The native library's kept buffer (csrc/workspace.cpp): one, as large as the largest request so far.

The formulas are those of csrc/linear.inl, frozen.inl, attention.inl and attention_backward.inl; sizes in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.plan.layer import GROUPS, Sizes

PACKED_BYTES, MIN_PACKED_ROWS, MAX_PACKED_ROWS, PANEL_ROWS = 2 << 20, 96, 1024, 14
TILE_FLOATS, TILE_COLUMNS = 640 * 128 + 8 * 5 * 16, 128
SLAB_ROWS, SLAB_DEPTH = 1024, 2048
ATTENTION_BYTES, FORWARD_KEYS, BACKWARD_KEYS, QUERY_ROWS = 32 << 20, 112, 48, 64
ATTENTION_TASKS, TASK_SCORES, PANEL_WIDTH = 16, 1 << 18, 32


@dataclass(frozen=True)
class Numbers:
    """How a product packs and sums: what it writes is float32 itself or not (`wide`), and how many go into a dword."""

    wide: bool
    in_dword: int

    def dwords(self, numbers: int) -> int:
        return -(-numbers // self.in_dword)

    def padded_rows(self, tokens: int, depth: int) -> int:
        fitting = PACKED_BYTES // 4 // max(self.dwords(depth), 1)
        parts = -(-tokens // min(max(fitting, MIN_PACKED_ROWS), MAX_PACKED_ROWS))
        return min(-(-tokens // max(parts, 1)) + PANEL_ROWS, tokens) + PANEL_ROWS

    def thread_floats(self, rows: int) -> int:
        """A tile, and sums of its columns where y is not float32 itself."""
        return TILE_FLOATS + (0 if self.wide else rows * TILE_COLUMNS)


def linear(tokens: int, into: int, out: int, rank: int, threads: int, n: Numbers) -> int:
    """Forward: x (part, in) and u (part, r) packed."""
    part = n.padded_rows(tokens, into)
    return 4 * (threads * n.thread_floats(part) + part * (n.dwords(into) + n.dwords(rank)) + out)


def linear_backward(tokens: int, into: int, out: int, rank: int, threads: int, n: Numbers) -> int:
    """g (part, out) and v (part, r) packed; for the adapters u and v whole, and sums of a tile a thread."""
    part = n.padded_rows(tokens, out)
    adapters = threads * (TILE_FLOATS + rank * TILE_COLUMNS) + 2 * n.dwords(tokens) * rank
    return 4 * max(threads * n.thread_floats(part) + part * (n.dwords(out) + n.dwords(rank)), adapters)


def frozen_backward(rows: int, into: int, out: int, threads: int, n: Numbers) -> int:
    """A slab of g, and the sums (part, in) where dx is not float32 itself."""
    part = min(rows, SLAB_ROWS)
    packed = (part + PANEL_ROWS) * min(n.dwords(out), SLAB_DEPTH)
    return 4 * (threads * TILE_FLOATS + packed + (0 if n.wide else part * into))


@dataclass(frozen=True)
class _Heads:
    """One sequence of all tokens: the most that packing can give."""

    tokens: int
    group: int
    kv_heads: int
    dim: int
    threads: int

    @property
    def stride(self) -> int:
        return -(-self.dim // 32) * 32 + 16

    @property
    def slots(self) -> int:
        return (self.tokens // 8 + 1) * 8

    def at_once(self, floats: int) -> int:
        return min(max(ATTENTION_BYTES // 4 // max(floats, 1), self.threads), self.kv_heads)


def attention(tokens: int, heads: int, kv_heads: int, dim: int, threads: int) -> int:
    """Packed keys and values of some heads at a time, and a panel of queries a thread."""
    h = _Heads(tokens, heads // kv_heads, kv_heads, dim, threads)
    floats = h.slots * (dim + h.stride)
    return 4 * (threads * (2 * dim + FORWARD_KEYS) * PANEL_WIDTH + h.at_once(floats) * floats)


def attention_backward(tokens: int, heads: int, kv_heads: int, dim: int, threads: int) -> int:
    """Keys and values packed both ways, and the tasks' sums of dk and dv."""
    h = _Heads(tokens, heads // kv_heads, kv_heads, dim, threads)
    fixed, sums = h.slots * (2 * dim + h.stride), 2 * h.slots * h.stride
    scores = tokens * tokens / 2 * h.group
    wanted = 1 + int(min(ATTENTION_TASKS / kv_heads, scores / TASK_SCORES))
    most = max(min(wanted, (ATTENTION_BYTES // 4 - fixed) // sums), 1)
    floats = fixed + most * sums
    scratch = QUERY_ROWS * (2 * h.stride + 3 * dim + 2) + 2 * BACKWARD_KEYS * (QUERY_ROWS + 16)
    return 4 * (threads * scratch + h.at_once(floats) * floats)


def largest(s: Sizes, loss_rows: int, threads: int, *, backward: bool) -> int:
    """Of all calls of a pass over `s.tokens` tokens, `loss_rows` of them through the head at a time."""
    a, n = s.arch, Numbers(s.itemsize == 4, 2 if s.pairs else 1)
    calls = [attention(s.tokens, a.heads, a.kv_heads, a.head_dim, threads)]
    if backward:
        calls.append(attention_backward(s.tokens, a.heads, a.kv_heads, a.head_dim, threads))
    for out, into in a.expert_linears.values():  # at most all tokens to one expert
        calls.append(linear(s.tokens, into, out, 0, threads, n))
        if backward:
            calls.append(linear_backward(s.tokens, into, out, 0, threads, n))
    for members, group in ((s.members(group), group) for group in GROUPS):
        if not members:
            continue
        out, into = sum(out for _, out, _ in members), members[0][2]
        calls.append(linear(s.tokens, into, out, s.ranks(group), threads, n))
        if backward:
            calls.append(linear_backward(s.tokens, into, out, s.ranks(group), threads, n))
    calls.append(linear(loss_rows, a.hidden, a.vocab, 0, threads, n))
    if backward:
        calls.append(frozen_backward(loss_rows, a.hidden, a.vocab, threads, n))
    return max(calls)
