"""Linear layers that read the same input, each with a 4-bit weight and perhaps a LoRA adapter, as one operator.

``y_i = x W_i^T + bias_i + scaling_i (x A_i^T) B_i^T`` for every member i of the group (q, k and v; gate and up; or one
layer alone), and its gradients. The weights and biases are frozen; only A and B learn.

The default below is the specification. On the CPU the native library packs `x` once for the whole group and adds the
adapters inside the same accumulation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import lora_panel
from halfbyte.kernels.abi import MAX_MEMBERS, NO_MEMORY
from halfbyte.kernels.buffers import empty, empty_like
from halfbyte.kernels.cpu import Library
from halfbyte.kernels.cpu_ops import fused_library, panel_library
from halfbyte.kernels.group import GroupView, Member
from halfbyte.quant.ops import require

_GROUP = (
    "Tensor[] codes, Tensor[] absmax, Tensor?[] nested_absmax, float[] nested_offset, str quant_type, int blocksize, "
    "int[] out_features, Tensor?[] bias, Tensor?[] lora_A, Tensor?[] lora_B, float[] scaling"
)
torch.library.define("halfbyte::lora_linear_4bit", f"(Tensor x, {_GROUP}) -> (Tensor y, Tensor u)")
torch.library.define(
    "halfbyte::lora_linear_4bit_backward",
    f"(Tensor g, Tensor x, Tensor u, {_GROUP}, bool need_dx) -> (Tensor dx, Tensor[] dA, Tensor[] dB)",
)

Group = tuple[
    list[Tensor], list[Tensor], list[Tensor | None], list[float], str, int, list[int],
    list[Tensor | None], list[Tensor | None], list[Tensor | None], list[float],
]  # fmt: skip
"""The group's arguments in the schema's order."""


def _members(group: Group, in_features: int) -> list[Member]:
    """The group by layers, checked: a kernel reads as far as these shapes say."""
    quant_type, blocksize = group[4:6]
    lists: list[list[Any]] = [*group[:4], *group[6:]]
    lengths = [len(each) for each in lists]
    require(lengths[0] > 0, lambda: "a group needs a member")
    require(len(set(lengths)) == 1, lambda: f"lists of {lengths} members")
    members = []
    for code, scale, nested, offset, out_features, bias, lora_A, lora_B, scaling in zip(*lists, strict=True):
        weight = (code, scale, nested, offset, quant_type, blocksize)
        member = Member(weight, out_features, bias, lora_A, lora_B, scaling)
        require((lora_A is None) == (lora_B is None), lambda: "lora_A and lora_B come together")
        for name, tensor, shape in (
            ("lora_A", lora_A, (member.rank, in_features)),
            ("lora_B", lora_B, (out_features, member.rank)),
        ):
            if tensor is not None and not (tensor.dtype == torch.float32 and tuple(tensor.shape) == shape):
                raise RuntimeError(f"{name} {tensor.dtype} {tuple(tensor.shape)}, not float32 {shape}")
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise RuntimeError(f"bias {tuple(bias.shape)}")
        members.append(member)
    return members


def _check_rows(name: str, rows: Tensor, columns: int, like: Tensor | None = None) -> None:
    fits = rows.dim() == 2 and rows.shape[1] == columns
    require(fits, lambda: f"{name} {tuple(rows.shape)}, not (T, {columns})")
    if like is not None:
        require(rows.shape[0] == like.shape[0], lambda: f"{name} has {rows.shape[0]} rows of {like.shape[0]}")


def _plain_forward(x: Tensor, members: list[Member]) -> tuple[Tensor, Tensor]:
    ys, us = [], [x.new_empty(x.shape[0], 0, dtype=torch.float32)]
    for member in members:
        bias = None if member.bias is None else member.bias.to(x.dtype)
        y = torch.ops.halfbyte.linear_4bit(x, *member.weight, member.out_features, bias)
        if member.lora_A is not None and member.lora_B is not None:
            us.append(x.float() @ member.lora_A.t())
            y = torch.addmm(y.float(), us[-1], member.lora_B.t(), alpha=member.scaling).to(x.dtype)
        ys.append(y)
    return ys[0] if len(ys) == 1 else torch.cat(ys, 1), torch.cat(us, 1)


def _plain_backward(
    g: Tensor, x: Tensor, u: Tensor, members: list[Member], need_dx: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dx, dA, dB = None, [], []
    gs = g.split([member.out_features for member in members], 1)
    us = iter(u.split([member.rank for member in members if member.lora_A is not None], 1))
    for member, g_i in zip(members, gs, strict=True):
        if need_dx:
            part = torch.ops.halfbyte.linear_4bit_dx(g_i, *member.weight, x.shape[1]).float()
            dx = part if dx is None else dx.add_(part)
        if member.lora_A is None or member.lora_B is None:
            continue
        wide = g_i.float()
        v = (wide @ member.lora_B).mul_(member.scaling)
        if dx is not None:
            dx.addmm_(v, member.lora_A)
        dA.append(v.t() @ x.float())
        dB.append((wide.t() @ next(us)).mul_(member.scaling))
    return x.new_empty(0, x.shape[1]) if dx is None else dx.to(x.dtype), dA, dB


def _forward_arguments(x: Tensor, group: Group) -> list[Member]:
    members = _members(group, x.shape[-1])
    _check_rows("x", x, x.shape[-1])
    return members


def _backward_arguments(g: Tensor, x: Tensor, u: Tensor, group: Group) -> list[Member]:
    members = _forward_arguments(x, group)
    _check_rows("g", g, sum(member.out_features for member in members), x)
    _check_rows("u", u, sum(member.rank for member in members), x)
    require(g.dtype == x.dtype, lambda: f"g is {g.dtype}, x {x.dtype}")
    require(u.dtype == torch.float32, lambda: f"u is {u.dtype}")
    return members


@torch.library.impl("halfbyte::lora_linear_4bit", "CompositeExplicitAutograd")
def _lora_linear_4bit(x: Tensor, *group: object) -> tuple[Tensor, Tensor]:
    return _plain_forward(x, _forward_arguments(x, group))  # type: ignore[arg-type]


@torch.library.register_fake("halfbyte::lora_linear_4bit")
def _lora_linear_4bit_fake(x: Tensor, *group: object) -> tuple[Tensor, Tensor]:
    members = _forward_arguments(x, group)  # type: ignore[arg-type]
    rank, width = sum(member.rank for member in members), sum(member.out_features for member in members)
    return x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], rank, dtype=torch.float32)


@torch.library.impl("halfbyte::lora_linear_4bit_backward", "CompositeExplicitAutograd")
def _lora_linear_4bit_backward(
    g: Tensor, x: Tensor, u: Tensor, *group_and_need_dx: object
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *group, need_dx = group_and_need_dx
    return _plain_backward(g, x, u, _backward_arguments(g, x, u, tuple(group)), bool(need_dx))  # type: ignore[arg-type]


@torch.library.register_fake("halfbyte::lora_linear_4bit_backward")
def _lora_linear_4bit_backward_fake(
    g: Tensor, x: Tensor, u: Tensor, *group_and_need_dx: object
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *group, need_dx = group_and_need_dx
    members = _backward_arguments(g, x, u, tuple(group))  # type: ignore[arg-type]
    pairs = [(member.lora_A, member.lora_B) for member in members if member.lora_A is not None]
    dA = [torch.empty_like(a, memory_format=torch.contiguous_format) for a, _ in pairs if a is not None]
    dB = [torch.empty_like(b, memory_format=torch.contiguous_format) for _, b in pairs if b is not None]
    return x.new_empty(x.shape if need_dx else (0, x.shape[1])), dA, dB


@torch.library.impl("halfbyte::lora_linear_4bit", "CPU")
def _lora_linear_4bit_cpu(x: Tensor, *group: object) -> tuple[Tensor, Tensor]:
    members = _forward_arguments(x, group)  # type: ignore[arg-type]
    library = _library(x, members)
    if library is not None:
        x = x.contiguous()
        y = empty((x.shape[0], sum(member.out_features for member in members)), x.dtype)
        u = empty((x.shape[0], sum(member.rank for member in members)), torch.float32)
        if GroupView(members, x.shape[1], x.dtype).linear(library, x, y, u) != NO_MEMORY:
            return y, u
    by_panels = panel_library(x, *members[0].weight[4:])
    if by_panels is not None:
        return lora_panel.forward(x.contiguous(), members, by_panels)
    return _plain_forward(x, members)


@torch.library.impl("halfbyte::lora_linear_4bit_backward", "CPU")
def _lora_linear_4bit_backward_cpu(
    g: Tensor, x: Tensor, u: Tensor, *group_and_need_dx: object
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *group, need_dx = group_and_need_dx
    members = _backward_arguments(g, x, u, tuple(group))  # type: ignore[arg-type]
    library = _library(x, members)
    if library is not None:
        g, x, u = g.contiguous(), x.contiguous(), u.contiguous()
        dA = [empty_like(m.lora_A) for m in members if m.lora_A is not None]
        dB = [empty_like(m.lora_B) for m in members if m.lora_B is not None]
        dx = empty_like(x) if need_dx else None
        view = GroupView(members, x.shape[1], x.dtype, list(zip(dA, dB, strict=True)))
        if view.linear_backward(library, g, x, u, dx) != NO_MEMORY:
            return x.new_empty(0, x.shape[1]) if dx is None else dx, dA, dB
    by_panels = panel_library(x, *members[0].weight[4:])
    if by_panels is not None:
        dx, dA, dB = lora_panel.backward(g.contiguous(), x.contiguous(), u, members, by_panels, need_dx=bool(need_dx))
        return x.new_empty(0, x.shape[1]) if dx is None else dx, dA, dB
    return _plain_backward(g, x, u, members, bool(need_dx))


def _library(x: Tensor, members: list[Member]) -> Library | None:
    """The native library, when its group products know this case and are the fastest way."""
    if len(members) > MAX_MEMBERS or not any(member.out_features for member in members):
        return None
    return fused_library(x, *members[0].weight[4:], x.shape[1])
