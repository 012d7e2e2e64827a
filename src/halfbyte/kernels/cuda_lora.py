"""Adapted 4-bit layers over one input on a GPU: one product with their weights, decoded side by side, and few more.

Products run in x's dtype with float32 sums; the adapters' gradients come out of them in float32. A few rows, as in
generating, are multiplied with the 4-bit bytes themselves. Importing this module registers it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.abi import DTYPES
from halfbyte.kernels.cuda_ops import check_weight, dequantize_into
from halfbyte.kernels.group import Member
from halfbyte.kernels.lora_linear import _backward_arguments, _forward_arguments, _plain_backward, _plain_forward
from halfbyte.kernels.registry import cuda_choice

FEW_ROWS = 2
"""Up to so many a layer's own product serves (kernels/cuda_ops.py): tiles for a few more are hardly faster than
decoding, and take a second or two of trying out for each shape."""


def _matrices(members: list[Member], columns: int) -> Any | None:
    """The module whose kernels make a group's matrices at once, where it serves: functions weights, adapters."""
    if "triton" not in cuda_choice().kernels:
        return None
    from halfbyte.kernels.triton import group

    return group if group.knows(members, columns) else None


def _weights(members: list[Member], x: Tensor) -> Tensor:
    """(all out_features, in_features) in the dtype of x."""
    kernels = _matrices(members, x.shape[1])
    if kernels is not None and kernels.aligned(members):
        for member in members:
            check_weight(member.weight, member.out_features * x.shape[1], x)
        decoded: Tensor = kernels.weights(members, x.shape[1], x.dtype)
        return decoded
    weight = x.new_empty(sum(member.out_features for member in members), x.shape[1])
    for rows, member in zip(weight.split([m.out_features for m in members]), members, strict=True):
        dequantize_into(rows, member.weight)
    return weight


def _adapters(members: list[Member], x: Tensor) -> tuple[Tensor, Tensor]:
    """The A's below each other (ranks, in_features), the scaled B's on a block diagonal (all out_features, ranks)."""
    kernels = _matrices(members, x.shape[1])
    if kernels is not None:
        found: tuple[Tensor, Tensor] = kernels.adapters(members, x.shape[1], x.dtype)
        return found
    a = torch.cat([m.lora_A for m in members if m.lora_A is not None])
    empty = [x.new_empty(m.out_features, 0, dtype=torch.float32) for m in members]
    b = [e if m.lora_B is None else m.scaling * m.lora_B for m, e in zip(members, empty, strict=True)]
    return a.to(x.dtype), torch.block_diag(*b).to(x.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, whatever their dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):  # since torch 2.8
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _base(x: Tensor, members: list[Member]) -> Tensor:
    """x W^T + bias of all members, side by side."""
    if x.shape[0] <= FEW_ROWS:
        each = [torch.ops.halfbyte.linear_4bit(x, *m.weight, m.out_features, m.bias) for m in members]
        return each[0] if len(each) == 1 else torch.cat(each, 1)
    y = x @ _weights(members, x).t()
    if any(member.bias is not None for member in members):
        for columns, member in zip(y.split([member.out_features for member in members], 1), members, strict=True):
            if member.bias is not None:
                columns += member.bias.to(x.dtype)
    return y


def _base_dx(g: Tensor, x: Tensor, members: list[Member]) -> Tensor:
    """The sum over the members of g_i W_i, in the dtype of x."""
    if x.shape[0] > FEW_ROWS:
        return g @ _weights(members, x)
    parts = [
        torch.ops.halfbyte.linear_4bit_dx(g_i, *member.weight, x.shape[1])
        for g_i, member in zip(g.split([member.out_features for member in members], 1), members, strict=True)
    ]
    dx: Tensor = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0, dtype=torch.float32).to(x.dtype)
    return dx


def lora_linear_4bit(x: Tensor, *group: object) -> tuple[Tensor, Tensor]:
    members = _forward_arguments(x, group)  # type: ignore[arg-type]
    if x.dtype not in DTYPES:
        return _plain_forward(x, members)
    y = _base(x, members)
    if not any(member.rank for member in members):
        return y, x.new_empty(x.shape[0], 0, dtype=torch.float32)
    a, b = _adapters(members, x)
    u = _product(x, a.t())
    y.addmm_(u.to(x.dtype), b.t())
    return y, u


def lora_linear_4bit_backward(
    g: Tensor, x: Tensor, u: Tensor, *group_and_need_dx: object
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *group, need_dx = group_and_need_dx
    members = _backward_arguments(g, x, u, tuple(group))  # type: ignore[arg-type]
    if x.dtype not in DTYPES:
        return _plain_backward(g, x, u, members, bool(need_dx))
    dx = _base_dx(g, x, members) if need_dx else x.new_empty(0, x.shape[1])
    if not any(member.rank for member in members):
        return dx, [], []
    a, b = _adapters(members, x)
    v = g @ b
    if need_dx:
        dx.addmm_(v, a)
    down, up = _product(v.t(), x), _product(g.t(), u.to(x.dtype))
    if len(members) == 1:
        return dx, [down], [up.mul_(members[0].scaling)]
    dA, dB = [], []
    row = column = 0
    for member in members:
        if member.rank:
            own = slice(column, column + member.rank)
            dA.append(down[own])
            dB.append(up[row : row + member.out_features, own] * member.scaling)
            column += member.rank
        row += member.out_features
    return dx, dA, dB


for _operator in (lora_linear_4bit, lora_linear_4bit_backward):
    torch.library.impl(f"halfbyte::{_operator.__name__}", "CUDA", _operator)
