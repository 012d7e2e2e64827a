"""The operators `choose_codes` and `improve_codes_` in plain torch: codes column by column, each beside the others."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 128
"""Columns that are chosen together; what they change in the others is one product."""


def choose_codes_reference(state: Tensor, scales: Tensor, factor: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Error feedback: ranks of levels, column after column of a weight (n of them, `out` rows), and their errors.

    Args:
        state: (n, out) float32, what is wanted, n at most MOST.
        scales: the same shape.
        factor: (n, n) float32, the upper Cholesky factor of the inverse of the inputs' second moments; what is above
            and on the diagonal is read.
        levels: (k,) float32, ascending, at most 256.

    Returns:
        ranks (n, out) uint8 and errors (n, out) float32, by the diagonal.
    """
    state, bounds = state.clone(), (levels[:-1] + levels[1:]) / 2
    inverse = _inverse(scales)
    ranks, errors = torch.empty(state.shape, dtype=torch.uint8), torch.empty_like(state)
    for i in range(len(state)):
        ranks[i] = torch.bucketize(state[i] * inverse[i], bounds)
        errors[i] = (state[i] - levels[ranks[i].int()] * scales[i]) / factor[i, i]
        state[i + 1 :] -= factor[i, i + 1 :, None] * errors[i]
    return ranks, errors


def improve_codes_reference(
    ranks: Tensor, values: Tensor, pull: Tensor, scales: Tensor, moments: Tensor, levels: Tensor
) -> None:
    """Coordinate descent, one sweep in place: each column gets the best code beside all others.

    Args:
        ranks: (out, in) uint8, of levels.
        values: (out, in) float32, the weights that these are.
        pull: (out, in) float32, what is missing of the wanted weight times `moments`.
        scales: (out, in) float32.
        moments: (in, in) float32, of the inputs: symmetric.
        levels: (k,) float32, ascending, at most 256.
    """
    bounds, inverse, diagonal = (levels[:-1] + levels[1:]) / 2, _inverse(scales), moments.diagonal()
    for start in range(0, len(moments), MOST):
        part = slice(start, start + MOST)
        near, before = pull[:, part].clone(), values[:, part].clone()
        for i in range(start, min(start + MOST, len(moments))):
            wish = values[:, i] + near[:, i - start] / diagonal[i]
            rank = torch.bucketize(wish * inverse[:, i], bounds)
            chosen = levels[rank] * scales[:, i]
            change = chosen - values[:, i]
            ranks[:, i] = rank.to(torch.uint8).where(change != 0, ranks[:, i])  # with a scale of 0 all are alike
            values[:, i] = chosen
            near -= change[:, None] * moments[i, part]
        pull -= (values[:, part] - before) @ moments[part]


def _inverse(scales: Tensor) -> Tensor:
    return scales.where(scales != 0, 1.0).reciprocal()
