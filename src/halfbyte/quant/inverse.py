"""Factors of large matrices, of products: our kernels multiply several times as fast as LAPACK's solve."""

from __future__ import annotations

from collections.abc import Iterator

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
    return torch.cat([product(a[:, :until], lower[rows, :until]) for rows, until in _steps(len(lower))], 1)


def factor_of_inverse_(matrix: Tensor) -> None:
    """Put the lower Cholesky factor L of its inverse, ``L L^T``, in the place of `matrix` (n, n), float32, positive
    definite; its lower half is read.

    By quarters: L's last one from that of `matrix`, its first from what that leaves (the Schur complement), and
    below the first ``-last last^T below first``.

    Raises:
        torch.linalg.LinAlgError: it is not positive definite.
    """
    half = len(matrix) // 2
    if half < LEAST:
        upper = torch.linalg.cholesky(matrix.flip(0, 1), upper=True).T.flip(0, 1)
        matrix.copy_(torch.linalg.solve_triangular(upper, torch.eye(len(matrix)), upper=True).T)
        return
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    factor_of_inverse_(last)
    left = torch.zeros(below.shape)
    for rows, until in _steps(len(last)):
        add_product(left[:until], last[rows, :until].T, below[rows])
    for rows, until in _steps(half):
        add_product(first[rows, :until], left[:, rows].T, left[:, :until], -1.0)
    factor_of_inverse_(first)
    across = torch.zeros_like(left)
    add_lower_product(across, left, first)
    below.zero_()
    for rows, until in _steps(len(last)):
        add_product(below[rows], last[rows, :until], across[:until], -1.0)
    matrix[:half, half:] = 0.0


def _steps(size: int) -> Iterator[tuple[slice, int]]:
    """The rows of a lower triangle, STEP at a time, and how many columns there are in these."""
    return ((slice(start, start + STEP), min(start + STEP, size)) for start in range(0, size, STEP))
