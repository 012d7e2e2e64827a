"""The codebooks: the only place in the repository where a table is typed.

A codebook maps a code to a value in [-1, 1]; a weight is ``codebook[code] * scale of its block``.
Sources: NF4 from arXiv 2305.14314 (appendix E), FP4 and the dynamic maps as bitsandbytes defines them. The digits
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

_SIGNED_MAGNITUDES = (
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

_UNSIGNED_MAGNITUDES = (
    3.2500003e-07, 7.75e-07, 2.1249998e-06, 4.3749997e-06, 6.625e-06, 8.874999e-06, 1.5624999e-05, 2.6875001e-05, 3.8125e-05, 4.9374998e-05,
    6.0625003e-05, 7.1875e-05, 8.312499e-05, 9.4375e-05, 0.000128125, 0.000184375, 0.00024062501, 0.00029687502, 0.00035312498, 0.00040937503,
    0.00046562502, 0.00052187504, 0.000578125, 0.000634375, 0.00069062505, 0.000746875, 0.0008031251, 0.00085937505, 0.000915625, 0.00097187504,
    0.001140625, 0.001421875, 0.001703125, 0.001984375, 0.002265625, 0.0025468748, 0.002828125, 0.0031093748, 0.0033906251, 0.003671875,
    0.003953125, 0.0042343745, 0.004515625, 0.0047968747, 0.005078125, 0.005359375, 0.0056406246, 0.005921875, 0.0062031248, 0.006484375,
    0.0067656254, 0.0070468746, 0.007328125, 0.0076093744, 0.007890625, 0.008171875, 0.008453124, 0.008734375, 0.009015624, 0.0092968745,
    0.009578126, 0.009859375, 0.010703126, 0.012109376, 0.013515624, 0.014921876, 0.016328124, 0.017734377, 0.019140625, 0.020546874,
    0.021953126, 0.023359375, 0.024765624, 0.026171876, 0.027578129, 0.028984373, 0.030390626, 0.031796873, 0.033203125, 0.034609374,
    0.036015626, 0.03742188, 0.038828123, 0.040234376, 0.041640624, 0.043046873, 0.044453125, 0.045859374, 0.047265626, 0.04867187,
    0.050078124, 0.051484372, 0.052890625, 0.054296877, 0.05570313, 0.057109382, 0.058515627, 0.059921872, 0.061328124, 0.06273438,
    0.06414063, 0.06554688, 0.06695312, 0.068359375, 0.06976563, 0.07117188, 0.072578125, 0.07398438, 0.07539063, 0.07679688,
    0.07820313, 0.07960938, 0.081015624, 0.08242188, 0.08382813, 0.085234374, 0.086640626, 0.08804687, 0.08945312, 0.090859376,
    0.09226563, 0.09367188, 0.095078126, 0.09648438, 0.09789063, 0.099296875, 0.103515625, 0.11054687, 0.11757813, 0.12460937,
    0.13164061, 0.13867188, 0.14570314, 0.15273437, 0.15976563, 0.16679686, 0.17382812, 0.18085939, 0.18789062, 0.19492188,
    0.20195311, 0.20898438, 0.21601564, 0.22304687, 0.23007813, 0.23710936, 0.24414062, 0.25117186, 0.25820312, 0.26523438,
    0.2722656, 0.27929688, 0.28632814, 0.29335937, 0.3003906, 0.30742186, 0.31445312, 0.3214844, 0.32851562, 0.33554685,
    0.3425781, 0.34960938, 0.35664064, 0.36367187, 0.3707031, 0.37773436, 0.38476562, 0.3917969, 0.39882812, 0.40585935,
    0.4128906, 0.41992188, 0.42695314, 0.43398437, 0.4410156, 0.44804686, 0.45507812, 0.4621094, 0.46914062, 0.47617185,
    0.4832031, 0.49023438, 0.4972656, 0.5042969, 0.5113281, 0.51835936, 0.5253906, 0.5324218, 0.53945315, 0.54648435,
    0.5535157, 0.5605469, 0.56757814, 0.5746094, 0.5816406, 0.5886719, 0.5957031, 0.6027344, 0.60976565, 0.61679685,
    0.6238282, 0.6308594, 0.63789064, 0.6449219, 0.6519531, 0.6589844, 0.6660156, 0.6730469, 0.68007815, 0.68710935,
    0.6941407, 0.7011719, 0.70820314, 0.7152344, 0.7222656, 0.7292969, 0.7363281, 0.7433594, 0.75039065, 0.75742185,
    0.7644532, 0.7714844, 0.7785156, 0.7855469, 0.7925781, 0.7996094, 0.8066406, 0.8136718, 0.82070315, 0.82773435,
    0.8347657, 0.8417969, 0.8488281, 0.8558594, 0.8628906, 0.8699219, 0.8769531, 0.8839843, 0.89101565, 0.89804685,
    0.9050782, 0.9121094, 0.9191406, 0.9261719, 0.9332031, 0.9402344, 0.9472656, 0.9542968, 0.96132815, 0.96835935,
    0.9753907, 0.9824219, 0.9894531, 0.9964844,
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
        boundaries=_midpoints(ascending),
        order=order.to(torch.uint8),
        zero_code=int((values == 0).nonzero()[0]),
    )


@cache
def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map, (256,) float32 ascending: dense near 0, sparse near 1, and no -1.0."""
    magnitudes = torch.tensor(_SIGNED_MAGNITUDES, dtype=torch.float32)
    return torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes, torch.ones(1)])


@cache
def dynamic_boundaries() -> Tensor:
    """(255,) float32, midpoints of neighbouring values of `dynamic_map`."""
    return _midpoints(dynamic_map())


@cache
def unsigned_dynamic_map() -> Tensor:
    """The 8-bit dynamic map of numbers that are not negative, (256,) float32 ascending from 0 to 1."""
    return torch.cat([torch.zeros(1), torch.tensor(_UNSIGNED_MAGNITUDES, dtype=torch.float32), torch.ones(1)])


@cache
def unsigned_dynamic_boundaries() -> Tensor:
    """(255,) float32, midpoints of neighbouring values of `unsigned_dynamic_map`; but the first is 0.

    So only 0 gets the code of 0. AdamW divides by the root of what this map holds: a second moment rounded to 0 turns
    a step of the learning rate into one of thousands of them (tests/kernels/test_adamw.py has the figures).
    """
    boundaries = _midpoints(unsigned_dynamic_map())
    boundaries[0] = 0.0
    return boundaries


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2
