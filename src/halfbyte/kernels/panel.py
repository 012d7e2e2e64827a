"""Matrix products by panels: decode some rows of the weight, multiply with torch's BLAS, repeat.

Serves where there is no fused kernel (portable instruction set, blocks that cross rows, no native library). It never
holds a whole decoded weight: the panel stays in the last-level cache, and what is allocated is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from halfbyte.kernels.cpu import Library, WeightView
from halfbyte.quant.reference import dequantize_reference

Weight = tuple[Tensor, Tensor, Tensor | None, float, str, int]
"""codes, absmax, nested_absmax, nested_offset, quant_type, blocksize."""

PANEL_ELEMENTS = 1 << 21
"""Decoded weights held at once: 8 MB in float32."""


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
    buffer = torch.empty(rows, in_features, dtype=dtype)
    for first in range(0, out_features, rows):
        panel = buffer[: min(rows, out_features - first)]
        view.dequantize_into(library, panel, first * in_features)
        yield first, panel


def compute_dtype(dtype: torch.dtype, library: Library | None) -> torch.dtype:
    """float32, unless this CPU multiplies `dtype` natively: else torch's half products are 10 to 100 times slower."""
    native = dtype == torch.bfloat16 and library is not None and library.fast_bf16
    return dtype if native or dtype == torch.float64 else torch.float32


def linear(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, library: Library | None) -> None:
    """out (m, out_features) = x (m, in_features) @ W^T + bias; one dtype."""
    dtype = compute_dtype(x.dtype, library)
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
    dtype = compute_dtype(grad.dtype, library)
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
