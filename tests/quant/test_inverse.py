"""Factors made of products, against LAPACK's in float64."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quant.inverse import LEAST, factor_of_inverse_
from halfbyte.quant.moments import Moments


def moments_of(columns: int) -> Moments:
    """Of inputs with few directions and some large columns, as activations have them."""
    torch.manual_seed(0)
    x = torch.randn(4000, columns // 8) @ torch.randn(columns // 8, columns) + 0.1 * torch.randn(4000, columns)
    x[:, :3] *= 30
    t = x + 0.05 * torch.randn(4000, columns)
    return Moments(x.T @ x, t.T @ x)


@pytest.mark.parametrize("columns", [64, 2 * LEAST, 4 * LEAST + 40])
def test_the_factor_of_an_inverse(columns: int) -> None:
    """Measured: 5e-5 of the largest value."""
    damped = moments_of(columns).damped
    expected = torch.linalg.cholesky(torch.linalg.inv(damped.double()))
    found = damped.tril()  # what is above is not read
    factor_of_inverse_(found)
    assert (found.double() - expected).abs().max() < 2e-4 * expected.abs().max()
    assert torch.equal(found, found.tril())


def test_a_matrix_that_is_not_positive_definite() -> None:
    matrix = torch.eye(4 * LEAST)
    matrix[0, 0] = -1.0
    with pytest.raises(torch.linalg.LinAlgError):
        factor_of_inverse_(matrix)


@pytest.mark.parametrize(("rows", "bound"), [(40, 1e-4), (1200, 5e-4)])
def test_wanted_and_error(rows: int, bound: float) -> None:
    """Of a weight with fewer rows than columns, and not. Measured: 2e-5 and 1.6e-4 of the shift in the outputs, and
    1e-6.
    """
    moments, target = moments_of(1200), torch.randn(rows, 1200, generator=torch.Generator().manual_seed(1))
    damped, own, cross = moments.damped.double(), moments.own.double(), moments.cross.double()
    shift = torch.linalg.solve(damped, (cross - own).T @ target.double().T).T
    wrong = moments.wanted(target).double() - (target.double() + shift)
    assert (wrong @ damped * wrong).sum() < bound**2 * (shift @ damped * shift).sum()
    assert moments.error(target) == pytest.approx(float((target.double() @ own * target.double()).sum()), rel=1e-5)
