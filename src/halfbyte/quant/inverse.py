"""Factors of large matrices, of products: our kernels multiply several times as fast as LAPACK's solve."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 256
"""Rows of a matrix that LAPACK factorises."""
STEP = 1024
"""Columns of a product with a triangle that are computed together."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) b^T (k, n), float32."""
    result: Tensor = torch.ops.halfbyte.product(a, b)
    return result


def add_product(sums: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """sums (m, n) float32 += alpha a (m, k) b (k, n), of one dtype; best with rows that lie in one piece."""
    torch.ops.halfbyte.add_product_(sums, a, b, alpha)


def add_lower_product(sums: Tensor, a: Tensor, lower: Tensor) -> None:
    """sums (m, n) += a (m, n) lower (n, n), a lower triangle."""
    for start in range(0, len(lower), STEP):
        add_product(sums[:, start : start + STEP], a[:, start:], lower[start:, start : start + STEP])


def lower_product(a: Tensor, lower: Tensor) -> Tensor:
    """a (m, n) lower^T (n, n), of a lower triangle."""
    steps = ((start, min(start + STEP, len(lower))) for start in range(0, len(lower), STEP))
    return torch.cat([product(a[:, :stop], lower[start:stop, :stop]) for start, stop in steps], 1)


def inverse_cholesky(matrix: Tensor) -> Tensor:
    """The inverse of the lower Cholesky factor of `matrix` (n, n), float32, positive definite.

    Of a matrix in four quarters, from those of its first and of what that leaves of its last (its Schur complement).

    Raises:
        torch.linalg.LinAlgError: it is not positive definite.
    """
    half = len(matrix) // 2
    if half < LEAST:
        eye = torch.eye(len(matrix))
        inverse: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), eye, upper=False)
        return inverse
    inverse = torch.zeros_like(matrix)
    first = inverse_cholesky(matrix[:half, :half])
    below = product(matrix[half:, :half], first)
    rest = matrix[half:, half:].clone()
    add_product(rest, below, below.T, -1.0)
    last = inverse_cholesky(rest)
    inverse[:half, :half], inverse[half:, half:] = first, last
    across = torch.zeros_like(below)
    add_product(across, below, first)
    add_product(inverse[half:, :half], last, across, -1.0)
    return inverse
