"""Adapted 4-bit layers over one input on a GPU: their weights decoded once, side by side, for one product.

Products run in x's dtype with float32 sums; the adapters' gradients come out of them in float32. A few rows, as in
generating, are multiplied with the 4-bit bytes themselves. Importing this module registers it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.abi import DTYPES
from halfbyte.kernels.cuda_ops import dequantize_into
from halfbyte.kernels.group import Member
from halfbyte.kernels.lora_linear import _backward_arguments, _forward_arguments, _plain_backward, _plain_forward

FEW_ROWS = 64
"""Up to so many a layer's own product serves (kernels/cuda_ops.py): then it is the faster one."""


def _decoded(members: list[Member], x: Tensor) -> Tensor:
    """(all out_features, in_features) in the dtype of x."""
    weight = x.new_empty(sum(member.out_features for member in members), x.shape[1])
    first = 0
    for member in members:
        dequantize_into(weight[first : first + member.out_features], member.weight)
        first += member.out_features
    return weight


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
    y = x @ _decoded(members, x).t()
    for columns, member in zip(y.split([member.out_features for member in members], 1), members, strict=True):
        if member.bias is not None:
            columns += member.bias.to(x.dtype)
    return y


def _base_dx(g: Tensor, x: Tensor, members: list[Member]) -> Tensor:
    """The sum over the members of g_i W_i, in the dtype of x."""
    if x.shape[0] > FEW_ROWS:
        return g @ _decoded(members, x)
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
    adapted = [member for member in members if member.lora_A is not None]
    y = _base(x, members)
    if not adapted:
        return y, x.new_empty(x.shape[0], 0, dtype=torch.float32)
    u = _product(x, torch.cat([m.lora_A for m in adapted if m.lora_A is not None]).to(x.dtype).t())
    us = iter(u.to(x.dtype).split([member.rank for member in adapted], 1))
    for columns, member in zip(y.split([member.out_features for member in members], 1), members, strict=True):
        if member.lora_B is not None:
            columns.addmm_(next(us), member.lora_B.to(x.dtype).t(), alpha=member.scaling)
    return y, u


def lora_linear_4bit_backward(
    g: Tensor, x: Tensor, u: Tensor, *group_and_need_dx: object
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *group, need_dx = group_and_need_dx
    members = _backward_arguments(g, x, u, tuple(group))  # type: ignore[arg-type]
    if x.dtype not in DTYPES:
        return _plain_backward(g, x, u, members, bool(need_dx))
    dx = _base_dx(g, x, members) if need_dx else x.new_empty(0, x.shape[1])
    adapted = [
        (g_i, member.lora_A, member.lora_B, member.scaling)
        for g_i, member in zip(g.split([member.out_features for member in members], 1), members, strict=True)
        if member.lora_A is not None and member.lora_B is not None
    ]
    if not adapted:
        return dx, [], []
    v = torch.cat([g_i @ (scaling * lora_B).to(g.dtype) for g_i, _, lora_B, scaling in adapted], 1)
    if need_dx:
        dx.addmm_(v, torch.cat([lora_A for _, lora_A, _, _ in adapted]).to(x.dtype))
    ranks = [lora_A.shape[0] for _, lora_A, _, _ in adapted]
    dA = [part.contiguous() for part in _product(v.t(), x).split(ranks)]
    us = u.to(x.dtype).split(ranks, 1)
    dB = [_product(g_i.t(), u_i).mul_(scaling) for (g_i, _, _, scaling), u_i in zip(adapted, us, strict=True)]
    return dx, dA, dB


for _operator in (lora_linear_4bit, lora_linear_4bit_backward):
    torch.library.impl(f"halfbyte::{_operator.__name__}", "CUDA", _operator)
