"""The codebooks: the only place in the repository where a table is typed.

A codebook maps a code to a value in [-1, 1]; a weight is ``codebook[code] * scale of its block``.
Sources: NF4 from arXiv 2305.14314 (appendix E), FP4 and the dynamic map as bitsandbytes defines them. The digits
are constants, not derivations: recomputing NF4 from normal quantiles differs by up to 1.1e-7.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
"""4-bit NormalFloat: quantiles of N(0, 1), 7 negative, 0 and 8 positive."""

FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Magnitudes of FP4 codes 0 to 7, times 12; codes 8 to 15 are their negatives. Not the order of MXFP4."""

_DYNAMIC_MAGNITUDES = (
    5.5000004e-07, 3.2500002e-06, 7.75e-06, 2.1249998e-05, 4.375e-05, 6.625e-05, 8.875e-05, 0.00015625001, 0.00026875004, 0.00038125002,
    0.00049375003, 0.0006062501, 0.00071875006, 0.00083125, 0.0009437501, 0.0012812499, 0.00184375, 0.00240625, 0.00296875, 0.0035312497,
    0.00409375, 0.0046562497, 0.0052187503, 0.00578125, 0.00634375, 0.00690625, 0.00746875, 0.00803125, 0.00859375, 0.009156249,
    0.00971875, 0.01140625, 0.01421875, 0.01703125, 0.019843752, 0.02265625, 0.02546875, 0.028281251, 0.03109375, 0.03390625,
    0.036718752, 0.03953125, 0.042343747, 0.04515625, 0.04796875, 0.05078125, 0.05359375, 0.05640625, 0.059218753, 0.06203125,
    0.06484375, 0.067656256, 0.070468746, 0.07328125, 0.07609375, 0.07890625, 0.08171876, 0.08453125, 0.08734375, 0.09015625,
    0.092968754, 0.09578126, 0.09859375, 0.107031256, 0.12109375, 0.13515624, 0.14921875, 0.16328125, 0.17734376, 0.19140625,
    0.20546874, 0.21953125, 0.23359375, 0.24765624, 0.26171875, 0.27578127, 0.28984374, 0.30390626, 0.31796873, 0.33203125,
    0.34609374, 0.36015624, 0.37421876, 0.38828123, 0.40234375, 0.41640624, 0.43046874, 0.44453126, 0.45859373, 0.47265625,
    0.4867187, 0.50078124, 0.5148437, 0.5289062, 0.54296875, 0.5570313, 0.5710938, 0.58515626, 0.5992187, 0.61328125,
    0.6273438, 0.6414063, 0.65546876, 0.6695312, 0.68359375, 0.6976563, 0.7117188, 0.72578126, 0.7398437, 0.75390625,
    0.7679688, 0.78203124, 0.79609376, 0.8101562, 0.82421875, 0.8382813, 0.85234374, 0.86640626, 0.8804687, 0.89453125,
    0.9085938, 0.92265624, 0.93671876, 0.9507812, 0.96484375, 0.9789063, 0.99296874,
)
# fmt: on


@dataclass(frozen=True)
class Codebook:
    """Sixteen values and what it takes to find the nearest one.

    Attributes:
        values: (16,) float32, by code.
        boundaries: (15,) float32, midpoints of neighbouring values in ascending order.
        order: (16,) uint8, the code of the k-th smallest value.
        zero_code: the code whose value is 0, used for padding and for all-zero blocks.
    """

    values: Tensor
    boundaries: Tensor
    order: Tensor
    zero_code: int


@cache
def codebook(quant_type: str) -> Codebook:
    """The codebook called `quant_type` ("nf4" or "fp4"), on the CPU."""
    if quant_type == "nf4":
        values = torch.tensor(NF4, dtype=torch.float32)
    elif quant_type == "fp4":
        magnitudes = torch.tensor(FP4_TWELFTHS, dtype=torch.float32) / 12
        values = torch.cat([magnitudes, -magnitudes])
    else:
        raise ValueError(f"unknown quant_type {quant_type!r}: choose nf4 or fp4")
    # A stable sort puts 0.0 before -0.0, so that a weight of 0 gets the code of 0.0.
    order = torch.argsort(values, stable=True)
    ascending = values[order]
    return Codebook(
        values=values,
        boundaries=(ascending[:-1] + ascending[1:]) / 2,
        order=order.to(torch.uint8),
        zero_code=int((values == 0).nonzero()[0]),
    )


@cache
def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map, (256,) float32 ascending: dense near 0, sparse near 1, and no -1.0."""
    magnitudes = torch.tensor(_DYNAMIC_MAGNITUDES, dtype=torch.float32)
    return torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes, torch.ones(1)])


@cache
def dynamic_boundaries() -> Tensor:
    """(255,) float32, midpoints of neighbouring values of `dynamic_map`."""
    values = dynamic_map()
    return (values[:-1] + values[1:]) / 2
