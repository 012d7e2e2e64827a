"""Matrix products by panels: decode some rows of the weight, multiply with torch's BLAS, repeat.

Serves where there is no fused kernel (portable instruction set, blocks that cross rows, no native library), and where
it was measured to be faster (`crossover.py`). It never holds
a whole decoded weight: the panel stays in the last-level cache, and what is allocated is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from halfbyte.kernels.buffers import empty
from halfbyte.kernels.cpu import Library, WeightView
from halfbyte.quant.reference import dequantize_reference

Weight = tuple[Tensor, Tensor, Tensor | None, float, str, int]
"""codes, absmax, nested_absmax, nested_offset, quant_type, blocksize."""

PANEL_ELEMENTS = 1 << 21
"""Decoded weights held at once: 8 MB in float32."""
WIDENED_ELEMENTS = 1 << 18
"""Numbers whose copy in float32 is held at once: 1 MB, which stays in the cache."""


def panel_rows(out_features: int, in_features: int, blocksize: int) -> int:
    """Rows of a panel: near `PANEL_ELEMENTS` weights, and whole blocks."""
    step = blocksize // gcd(blocksize, in_features)
    wanted = max(PANEL_ELEMENTS // max(in_features, 1) // step, 1) * step
    return min(wanted, max(out_features, 1))


def _panels(
    weight: Weight, out_features: int, in_features: int, dtype: torch.dtype, library: Library | None
) -> Iterator[tuple[int, Tensor]]:
    """(first row, decoded rows (n, in_features)) over the weight; a panel is overwritten by the next one."""
    if library is None:
        yield 0, dequantize_reference(*weight, (out_features, in_features), dtype)
        return
    view = WeightView(*weight, (out_features, in_features))
    rows = panel_rows(out_features, in_features, weight[5])
    buffer = empty((rows, in_features), dtype)
    for first in range(0, out_features, rows):
        panel = buffer[: min(rows, out_features - first)]
        view.dequantize_into(library, panel, first * in_features)
        yield first, panel


def native(dtype: torch.dtype, library: Library | None) -> bool:
    """Does this CPU multiply `dtype` itself? Else torch's half products are 10 to 100 times slower."""
    wide = dtype in (torch.float32, torch.float64)
    return wide or (dtype == torch.bfloat16 and library is not None and library.fast_bf16)


def linear(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, library: Library | None) -> None:
    """out (m, out_features) = x (m, in_features) @ W^T + bias; one dtype."""
    dtype = x.dtype if native(x.dtype, library) else torch.float32
    x = x.to(dtype)
    for first, panel in _panels(weight, out.shape[1], x.shape[1], dtype, library):
        columns = out[:, first : first + panel.shape[0]]
        product = torch.mm(x, panel.t(), out=columns if out.dtype == dtype else None)
        if bias is not None:
            product += bias[first : first + panel.shape[0]]
        if out.dtype != dtype:
            columns.copy_(product)


def linear_dx(grad: Tensor, weight: Weight, out: Tensor, library: Library | None) -> None:
    """out (m, in_features) = grad (m, out_features) @ W; one dtype. Sums of panels are kept in float32."""
    dtype = grad.dtype if native(grad.dtype, library) else torch.float32
    grad = grad.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = out.zero_() if out.dtype == wide else torch.zeros(out.shape, dtype=wide)
    for first, panel in _panels(weight, grad.shape[1], out.shape[1], dtype, library):
        part = grad[:, first : first + panel.shape[0]]
        if total.dtype == dtype:
            total.addmm_(part, panel)
        else:
            total += part @ panel
    if total is not out:
        out.copy_(total)


def add_dx(grad: Tensor, weight: Weight, total: Tensor, part: Tensor, library: Library) -> None:
    """total (m, in_features) float32 += grad (m, out_features) @ W; `part` is as in `add_product`."""
    for first, panel in _panels(weight, grad.shape[1], total.shape[1], grad.dtype, library):
        add_product(grad[:, first : first + panel.shape[0]], panel, total, part)


def add_product(a: Tensor, b: Tensor, total: Tensor, part: Tensor) -> None:
    """total float32 += a @ b; where a and b are narrower, by way of `part`, in their dtype and of total's shape."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    torch.mm(a, b, out=part)
    rows = max(WIDENED_ELEMENTS // max(part.shape[1], 1), 1)  # torch makes a copy of what it has to widen
    for some, more in zip(total.split(rows), part.split(rows), strict=True):
        some += more
