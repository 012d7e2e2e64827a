"""Layers over one input with their adapters, by panels: every product goes where its result belongs.

Serves where panels do (`crossover.py`), in x's own dtype, which torch multiplies natively. Beside the results it holds
one panel, and backward the sum of dx in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels import panel
from halfbyte.kernels.buffers import empty, empty_like
from halfbyte.kernels.cpu import Library
from halfbyte.kernels.group import Member


def forward(x: Tensor, members: list[Member], library: Library) -> tuple[Tensor, Tensor]:
    """x (T, in) -> y (T, all out_features), u (T, all ranks) in float32."""
    y = empty((x.shape[0], sum(member.out_features for member in members)), x.dtype)
    u = empty((x.shape[0], sum(member.rank for member in members)), torch.float32)
    column = low = 0
    for member in members:
        columns = y[:, column : column + member.out_features]
        panel.linear(x, member.weight, None if member.bias is None else member.bias.to(x.dtype), columns, library)
        column += member.out_features
        if member.lora_A is None or member.lora_B is None:
            continue
        product = x @ member.lora_A.to(x.dtype).t()
        u[:, low : low + member.rank] = product
        columns.addmm_(product, member.lora_B.to(x.dtype).t(), alpha=member.scaling)
        low += member.rank
    return y, u


def backward(
    g: Tensor, x: Tensor, u: Tensor, members: list[Member], library: Library, *, need_dx: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """dx (T, in) if needed, and dA and dB of the adapters, float32."""
    dx = empty_like(x) if need_dx else None
    total = None if dx is None else (dx if x.dtype == torch.float32 else empty(x.shape, torch.float32)).zero_()
    dA, dB = [], []
    column = low = 0
    for member in members:
        columns = g[:, column : column + member.out_features]
        column += member.out_features
        if total is not None and dx is not None:
            panel.add_dx(columns, member.weight, total, dx, library)
        if member.lora_A is None or member.lora_B is None:
            continue
        v = (columns @ member.lora_B.to(x.dtype)).mul_(member.scaling)
        if total is not None and dx is not None:
            panel.add_product(v, member.lora_A.to(x.dtype), total, dx)
        dA.append(empty_like(member.lora_A).copy_(v.t() @ x))
        d_up = columns.t() @ u[:, low : low + member.rank].to(x.dtype)
        dB.append(empty_like(member.lora_B).copy_(d_up).mul_(member.scaling))
        low += member.rank
    if dx is not None and total is not None and total is not dx:
        dx.copy_(total)
    return dx, dA, dB
