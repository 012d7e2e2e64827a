"""4-bit codes chosen column by column, each column's error made up for by those that come after it (GPTQ).

Rounding every weight to its nearest value erases a small update: the base's values lie on the grid already, and
rounding takes them back to it. Here what counts is the layer's output on calibration text, so that many small changes
that point one way move some codes. Method: arXiv 2210.17323, with columns in the order of their activations' size; the
target is first moved by what the layers before have changed in the input (arXiv 2504.02692).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.config import QuantConfig
from halfbyte.quant import QuantizedWeight, quantize_slices
from halfbyte.quant.absmax import expand_absmax
from halfbyte.quant.codebook import codebook
from halfbyte.quant.nibbles import pack_nibbles

DAMPING = 0.01
"""Added to the diagonal of the inputs' second moments, as a part of its mean: columns that hardly ever fire."""
PANEL = 128
"""Columns after which the rest of the matrix is brought up to date in one product."""


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's input over the calibration text.

    Attributes:
        own: (in, in) float32, x^T x of the inputs x that the quantized model gives the layer.
        cross: (in, in) float32, t^T x, t being the inputs that the trained model gives it.
    """

    own: Tensor
    cross: Tensor


def round_with_feedback(target: Tensor, moments: Moments, recipe: QuantConfig, *, name: str) -> QuantizedWeight:
    """The 4-bit weight W of the scales that `target` has for which x W^T is close to t target^T.

    Args:
        target: (out, in) float32.
    """
    plain = quantize_slices([target], tuple(target.shape), target.dtype, recipe, name=name)
    scales = plain.absmax
    if plain.nested_absmax is not None:
        scales = expand_absmax(plain.absmax, plain.nested_absmax, plain.nested_offset)
    steps = scales.repeat_interleave(plain.blocksize)[: target.numel()].view(target.shape)
    damped = moments.own.clone()
    dead = damped.diagonal() <= 0
    damped.diagonal()[dead] = 1.0
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    shift = target @ (moments.cross - moments.own)
    wanted = target + torch.cholesky_solve(shift.T, torch.linalg.cholesky(damped)).T
    order = damped.diagonal().argsort(descending=True)
    ranks = _codes(wanted.T[order].contiguous(), steps.T[order].contiguous(), damped[order][:, order], recipe)
    back = torch.empty_like(ranks)
    back[order] = ranks
    table = codebook(recipe.quant_type)
    codes = pack_nibbles(table.order[back.T.reshape(-1).int()], table.zero_code)
    return replace(plain, codes=codes)


def _codes(columns: Tensor, steps: Tensor, moments: Tensor, recipe: QuantConfig) -> Tensor:
    """Ranks in the ascending codebook, (in, out) uint8, of `columns` (in, out), which are used up; scales `steps`."""
    table = codebook(recipe.quant_type)
    values, inverse = table.values[table.order.int()], steps.where(steps != 0, 1.0).reciprocal()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    ranks = torch.empty(columns.shape, dtype=torch.uint8)
    for start in range(0, len(columns), PANEL):
        stop = min(start + PANEL, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            rank = torch.bucketize(columns[i] * inverse[i], table.boundaries)
            ranks[i] = rank
            error = (columns[i] - values[rank] * steps[i]) / upper[i, i]
            columns[i + 1 : stop] -= upper[i, i + 1 : stop, None] * error
            errors[i - start] = error
        columns[stop:] -= upper[start:stop, stop:].T @ errors
    return ranks
