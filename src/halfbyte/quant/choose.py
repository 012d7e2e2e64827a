"""The operator `choose_codes` in plain torch: a few columns of codes, each beside those before it."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 128
"""Columns that are chosen together; what they change in the others is one product."""


def choose_codes_reference(
    state: Tensor, values: Tensor | None, scales: Tensor, matrix: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """Ranks of levels, column after column of a weight (n of them, `out` rows), and what each choice changes.

    Without `values`, error feedback: `state` is what is wanted, `matrix` the upper Cholesky factor of the inverse of
    the inputs' second moments, the change the error by its diagonal. With them, coordinate descent: `values` are
    the weights so far, `matrix` the moments, `state` moments times what is missing, and the change is the weight's.

    Args:
        state, values, scales: (n, out) float32, n at most MOST.
        matrix: (n, n) float32, what is above and on the diagonal is read.
        levels: (k,) float32, ascending, at most 256.

    Returns:
        ranks (n, out) uint8 and changes (n, out) float32.
    """
    state, bounds = state.clone(), (levels[:-1] + levels[1:]) / 2
    inverse = scales.where(scales != 0, 1.0).reciprocal()
    ranks, changes = torch.empty(state.shape, dtype=torch.uint8), torch.empty_like(state)
    for i in range(len(state)):
        step = 1 / matrix[i, i]
        wish = state[i] if values is None else values[i] + state[i] * step
        ranks[i] = torch.bucketize(wish * inverse[i], bounds)
        chosen = levels[ranks[i].int()] * scales[i]
        changes[i] = (wish - chosen) * step if values is None else chosen - values[i]
        state[i + 1 :] -= matrix[i, i + 1 :, None] * changes[i]
    return ranks, changes
