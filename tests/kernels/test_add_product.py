"""Sums of products for calibration, against a float64 oracle on every instruction set: k products and what was there,
summed in float32, are within 1e-6 of the sum of their magnitudes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

add_product = torch.ops.halfbyte.add_product_


def case(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, a and b, each a part of a wider matrix."""
    torch.manual_seed(m + k + n)
    return torch.randn(m, n + 5)[:, :n], torch.randn(m, k + 3).to(dtype)[:, :k], torch.randn(k, n + 7).to(dtype)[:, :n]


@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 33, 7), (64, 100, 129), (130, 2049, 48), (1030, 17, 20)])
def test_as_the_oracle(isa: str, m: int, k: int, n: int, dtype: torch.dtype, alpha: float) -> None:
    sums, a, b = case(m, k, n, dtype)
    exact = sums.double() + alpha * (a.double() @ b.double())
    size = sums.double().abs() + a.double().abs() @ b.double().abs()
    add_product(sums, a, b, alpha)
    assert ((sums.double() - exact).abs() <= 1e-6 * size).all()


def test_what_lies_beside_the_sums_stays(isa: str) -> None:
    whole = torch.ones(40, 60)
    add_product(whole[3:20, 5:30], torch.randn(17, 9), torch.randn(9, 25))
    rest = torch.ones_like(whole).bool()
    rest[3:20, 5:30] = False
    assert (whole[rest] == 1).all()


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums, a, b = case(700, 300, 200, torch.bfloat16)
            add_product(sums, a, b)
            found.append(sums)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_turned_operands_and_other_dtypes() -> None:
    """What the native one does not know: rows that do not lie in one piece, float64 sums, nothing at all."""
    torch.manual_seed(0)
    a, b = torch.randn(9, 12), torch.randn(8, 9)
    for sums in (torch.zeros(12, 8), torch.zeros(8, 12).T, torch.zeros(12, 8, dtype=torch.float64)):
        add_product(sums, a.T, b.T)
        torch.testing.assert_close(sums.double(), a.T.double() @ b.T.double(), rtol=1e-6, atol=1e-5)
    sums = torch.ones(12, 8)
    add_product(sums, a.T[:, :0], b.T[:0])
    assert (sums == 1).all()


def test_schema() -> None:
    opcheck(add_product.default, (torch.zeros(4, 6), torch.randn(4, 5), torch.randn(5, 6), 2.0))
