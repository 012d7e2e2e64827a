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


def linear(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, library: Library | None) -> None:
    """out (m, out_features) = x (m, in_features) @ W^T + bias; one dtype."""
    for first, panel in _panels(weight, out.shape[1], x.shape[1], x.dtype, library):
        columns = out[:, first : first + panel.shape[0]]
        if bias is None:
            torch.mm(x, panel.t(), out=columns)
        else:
            torch.addmm(bias[first : first + panel.shape[0]], x, panel.t(), out=columns)


def linear_dx(grad: Tensor, weight: Weight, out: Tensor, library: Library | None) -> None:
    """out (m, in_features) = grad (m, out_features) @ W; one dtype. Sums in float32 over panels, rounds once."""
    total = out if out.dtype == torch.float32 else torch.zeros(out.shape, dtype=torch.float32)
    for first, panel in _panels(weight, grad.shape[1], out.shape[1], out.dtype, library):
        part = grad[:, first : first + panel.shape[0]]
        if total is out:
            torch.addmm(out, part, panel, beta=float(first > 0), out=out)
        else:
            total += part @ panel
    if grad.shape[1] == 0:
        out.zero_()
    elif total is not out:
        out.copy_(total)
