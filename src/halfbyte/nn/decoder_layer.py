"""A whole decoder layer as one autograd function: what is saved is chosen by hand, and every pass over memory counted.

Forward keeps x, the rotated q, k, v, the attention's output, the sum after it, and gate and up; the norms' outputs
and the MLP's product are made again in the backward, which costs one pass each. With gradient checkpointing only x is
kept, and what the backward does not read is not computed again: the down projection, the largest of the layer's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.nn.dora import row_norms, stretched
from halfbyte.nn.layer_spec import LayerSpec, Norm, Projection
from halfbyte.nn.streamed import StreamedLayer

ops = torch.ops.halfbyte


@dataclass(frozen=True)
class Group:
    """Linear layers over the same input, as the operators take them."""

    members: tuple[Projection, ...]

    @property
    def adapters(self) -> list[Tensor]:
        """A and B, with DoRA the magnitude, of the adapted members, in order."""
        return [t for p in self.members for t in (p.lora_A, p.lora_B, p.magnitude) if t is not None]

    @property
    def args(self) -> tuple[Any, ...]:
        bases = [p.base for p in self.members]
        return (
            [b.codes for b in bases], [b.absmax for b in bases], [b.nested_absmax for b in bases],
            [b.nested_offset for b in bases], bases[0].quant_type, bases[0].blocksize,
            [b.out_features for b in bases], [p.base.bias if p.magnitude is None else None for p in self.members],
            [p.lora_A for p in self.members], [p.lora_B for p in self.members], [p.scaling for p in self.members],
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, in) -> y (T, sum of out), u (T, sum of ranks)."""
        y, u = ops.lora_linear_4bit(x, *self.args)
        for p, mine in self._stretched():
            assert p.magnitude is not None
            stretched(y[:, mine], p.magnitude, row_norms(p), out=y[:, mine])
            if p.base.bias is not None:
                y[:, mine] += p.base.bias
        return y, u

    def backward(self, g: Tensor, x: Tensor, u: Tensor, *, need_dx: bool = True) -> tuple[Tensor, list[Tensor]]:
        """-> dx, and dA and dB of the adapted members in the order of `adapters`."""
        g, magnitudes = self._stretched_backward(g, x)
        dx, da, db = ops.lora_linear_4bit_backward(g, x, u, *self.args, need_dx)
        return dx, [t for grads in zip(da, db, magnitudes, strict=True) for t in grads if t is not None]

    def _stretched(self) -> list[tuple[Projection, slice]]:
        """The members whose rows DoRA stretches, and their columns of y."""
        ends = list(accumulate(p.base.out_features for p in self.members))
        columns = map(slice, [0, *ends], ends)
        return [(p, mine) for p, mine in zip(self.members, columns, strict=True) if p.magnitude is not None]

    def _stretched_backward(self, g: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient before rows were stretched, and those of the adapted members' magnitudes.

        What was stretched is computed again: kept, it would be the largest of all that a layer keeps.
        """
        found: dict[int, Tensor] = {}
        members = self._stretched()
        if members:
            y, g = ops.lora_linear_4bit(x, *self.args)[0], g.clone()
        for p, mine in members:
            assert p.magnitude is not None
            norms = row_norms(p)
            found[id(p)] = y[:, mine].mul_(g[:, mine]).sum(0, dtype=torch.float32) / norms
            stretched(g[:, mine], p.magnitude, norms, out=g[:, mine])
        return g, [found.get(id(p)) for p in self.members if p.lora_A is not None]


@dataclass(frozen=True)
class DecoderCall:
    """One use of a layer: its description, its linear layers as they are now, and where sequences begin."""

    spec: LayerSpec
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    cos: Tensor
    sin: Tensor
    seq_starts: Tensor
    parents: Tensor | None
    checkpoint: bool
    backward_follows: bool
    streamed: StreamedLayer | None
    """Where the 4-bit bytes come from, if they do not stay in memory."""

    def in_memory(self, *, backward: bool) -> AbstractContextManager[None]:
        """Inside the block the 4-bit bytes are there."""
        if self.streamed is None:
            return nullcontext()
        return self.streamed.in_memory(backward=backward, turns=self.backward_follows)

    def part(self, start: int, stop: int) -> DecoderCall:
        """This call for the rows from `start` to `stop`, both of which begin a sequence or end the last."""
        first, last = torch.searchsorted(self.seq_starts, torch.tensor([start, stop], dtype=torch.int32)).tolist()
        parents = self.parents
        if parents is not None:
            parents = (parents[first:last] - first).clamp(min=-1)
        return replace(
            self, cos=self.cos[start:stop], sin=self.sin[start:stop], parents=parents,
            seq_starts=self.seq_starts[first : last + 1] - start,
        )  # fmt: skip

    @property
    def adapters(self) -> list[Tensor]:
        return [t for group in (self.qkv, self.o, self.gate_up, self.down) for t in group.adapters]

    @property
    def attention_args(self) -> tuple[Any, ...]:
        spec = self.spec
        return spec.num_heads, spec.num_kv_heads, self.seq_starts, spec.scale, spec.sliding_window, self.parents


class _Saved(NamedTuple):
    """What the backward reads, besides x. None where the layer has no such norm."""

    rstd: Tensor
    qkv: Tensor
    head_rstd: Tensor | None
    u_qkv: Tensor
    attention: Tensor
    lse: Tensor
    u_o: Tensor
    o: Tensor | None
    o_rstd: Tensor | None
    h: Tensor
    h_rstd: Tensor
    gate_up: Tensor
    u_gate_up: Tensor


def _norm(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    y, rstd = ops.rms_norm(x, norm.weight, norm.eps, norm.offset)
    return y, rstd


def _norm_backward(g: Tensor, x: Tensor, norm: Norm, rstd: Tensor | None, add: Tensor | None = None) -> Tensor:
    dx: Tensor = ops.rms_norm_backward(g, x, norm.weight, rstd, norm.offset, add)
    return dx


def _rotate(qkv: Tensor, call: DecoderCall, *, inverse: bool = False) -> None:
    spec = call.spec
    ops.rope_(qkv, call.cos, call.sin, spec.num_heads + spec.num_kv_heads, spec.head_dim, inverse)


def _head_norms(qkv: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
    """q and k normed head by head; the same tensor where the layer has no such norms."""
    q, k = spec.q_norm, spec.k_norm
    if q is None or k is None:
        return qkv, None
    normed, rstd = ops.rms_norm_heads(qkv, q.weight, k.weight, spec.num_heads, spec.num_kv_heads, q.eps, q.offset)
    return normed, rstd


def _until_down(x: Tensor, call: DecoderCall) -> tuple[_Saved, Tensor]:
    """The layer up to gate and up; and q, k, v as attention reads them."""
    spec = call.spec
    normed, rstd = _norm(x, spec.input_norm)
    qkv, u_qkv = call.qkv.forward(normed)
    rotated, head_rstd = _head_norms(qkv, spec)
    _rotate(rotated, call)
    attention, lse = ops.packed_attention(rotated, *call.attention_args)
    del normed
    o, u_o = call.o.forward(attention)
    o_before, o_rstd = None, None
    if spec.post_attention_norm is not None:
        o_before = o
        o, o_rstd = _norm(o, spec.post_attention_norm)
    norm = spec.mlp_norm
    h, normed, h_rstd = ops.add_rms_norm(x, o, norm.weight, norm.eps, norm.offset)
    gate_up, u_gate_up = call.gate_up.forward(normed)
    saved = _Saved(
        rstd, qkv, head_rstd, u_qkv, attention, lse, u_o, o_before, o_rstd, h, h_rstd, gate_up, u_gate_up
    )  # fmt: skip
    return saved, rotated


def _mlp_backward(
    g: Tensor, call: DecoderCall, saved: _Saved, u_down: Tensor, down: Tensor | None, down_rstd: Tensor | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradient at h, and those of the adapters of gate and up, and of down."""
    spec = call.spec
    g_down = (
        g if spec.post_mlp_norm is None or down is None else _norm_backward(g, down, spec.post_mlp_norm, down_rstd)
    )
    product = ops.gated(saved.gate_up, spec.activation)
    g_product, d_down = call.down.backward(g_down, product, u_down)
    del product
    g_gate_up, _ = ops.gated_backward(g_product, saved.gate_up, spec.activation)
    normed, _ = _norm(saved.h, spec.mlp_norm)
    g_normed, d_gate_up = call.gate_up.backward(g_gate_up, normed, saved.u_gate_up)
    return _norm_backward(g_normed, saved.h, spec.mlp_norm, saved.h_rstd, g), d_gate_up, d_down


def _attention_backward(
    g_h: Tensor, x: Tensor, call: DecoderCall, saved: _Saved, *, need_dx: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradient at x, and those of the adapters of q, k and v, and of o."""
    spec = call.spec
    g_o = g_h
    if spec.post_attention_norm is not None and saved.o is not None:
        g_o = _norm_backward(g_h, saved.o, spec.post_attention_norm, saved.o_rstd)
    g_attention, d_o = call.o.backward(g_o, saved.attention, saved.u_o)
    rotated, _ = _head_norms(saved.qkv, spec)
    if rotated is not saved.qkv:
        _rotate(rotated, call)
    g_qkv = ops.packed_attention_backward(g_attention, rotated, saved.attention, saved.lse, *call.attention_args)
    del rotated, g_attention
    _rotate(g_qkv, call, inverse=True)
    q, k = spec.q_norm, spec.k_norm
    if q is not None and k is not None:
        ops.rms_norm_heads_backward_(
            g_qkv, saved.qkv, q.weight, k.weight, saved.head_rstd, spec.num_heads, spec.num_kv_heads, q.offset
        )
    normed, _ = _norm(x, spec.input_norm)
    g_normed, d_qkv = call.qkv.backward(g_qkv, normed, saved.u_qkv, need_dx=need_dx)
    dx = _norm_backward(g_normed, x, spec.input_norm, saved.rstd, g_h) if need_dx else None
    return dx, d_qkv, d_o


class DecoderLayer(torch.autograd.Function):
    """x (T, hidden) -> y (T, hidden); and q, k, v as attention reads them, for a cache: no gradient flows there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: DecoderCall, *adapters: Tensor) -> tuple[Tensor, Tensor]:
        spec = call.spec
        with call.in_memory(backward=False):
            saved, rotated = _until_down(x, call)
            product = ops.gated(saved.gate_up, spec.activation)
            down, u_down = call.down.forward(product)
        del product
        y, down_rstd, down_before = down, None, None
        if spec.post_mlp_norm is not None:
            down_before = down
            y, down_rstd = _norm(down, spec.post_mlp_norm)
        y.add_(saved.h)
        ctx.call = call
        kept = () if call.checkpoint else saved
        ctx.num_adapters = len(adapters)  # kept so that autograd notices if one is changed before the backward
        ctx.save_for_backward(*adapters, x, u_down, down_before, down_rstd, *kept)
        ctx.mark_non_differentiable(rotated)
        return y, rotated

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        call: DecoderCall = ctx.call
        x, u_down, down, down_rstd, *kept = ctx.saved_tensors[ctx.num_adapters :]
        with call.in_memory(backward=True):
            saved = _Saved(*kept) if kept else _until_down(x, call)[0]
            del kept
            g_h, d_gate_up, d_down = _mlp_backward(g.contiguous(), call, saved, u_down, down, down_rstd)
            dx, d_qkv, d_o = _attention_backward(g_h, x, call, saved, need_dx=ctx.needs_input_grad[0])
        return dx, None, *d_qkv, *d_o, *d_gate_up, *d_down
