"""The native `choose_codes` and `improve_codes_` equal the plain-torch ones, on any ISA, in any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.quant.choose import choose_codes_reference, improve_codes_reference
from halfbyte.quant.codebook import codebook

LEVELS = {"nf4": codebook("nf4", 64).values.sort().values, "32 steps": torch.arange(32.0) - 16}


def moments_of(size: int) -> Tensor:
    x = torch.randn(3 * size, size) @ torch.randn(size, size)
    return x.T @ x / len(x) + torch.eye(size)


def scales_of(rows: int, cols: int) -> Tensor:
    """One of each eight weights, and some zeros."""
    scales = torch.randn(rows, -(-cols // 8), 1).expand(-1, -1, 8).reshape(rows, -1)[:, :cols].contiguous()
    scales[: rows // 2, cols // 2] = 0
    return scales


def feedback_case(rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows + cols)
    upper = torch.linalg.cholesky(torch.linalg.inv(moments_of(rows)), upper=True)
    return torch.randn(rows, cols), scales_of(cols, rows).T.contiguous(), upper


def sweep_case(rows: int, cols: int, levels: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    torch.manual_seed(rows + cols)
    moments, scales = moments_of(cols), scales_of(rows, cols)
    ranks = torch.randint(0, len(levels), (rows, cols), dtype=torch.uint8)
    values = levels[ranks.int()] * scales
    return (ranks, values, 0.3 * torch.randn(rows, cols) @ moments), scales, moments


@pytest.mark.parametrize("levels", list(LEVELS))
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 33), (64, 100), (128, 31)])
def test_error_feedback_as_the_reference(isa: str, rows: int, cols: int, levels: str) -> None:
    """A rounding apart, a code may fall on another side of a midpoint, and those after it follow: none did."""
    state, scales, factor = feedback_case(rows, cols)
    wide = torch.zeros(rows, rows + 7)  # a part of a larger matrix
    wide[:, :rows] = factor
    arguments = (state, scales, wide[:, :rows], LEVELS[levels])
    ranks, errors = torch.ops.halfbyte.choose_codes(*arguments)
    wanted_ranks, wanted_errors = choose_codes_reference(*arguments)
    assert float((ranks != wanted_ranks).float().mean()) <= 0.01
    same = (ranks == wanted_ranks).all(0)
    torch.testing.assert_close(errors[:, same], wanted_errors[:, same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("levels", list(LEVELS))
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (33, 5), (100, 128), (31, 700), (7, 1290)])
def test_a_sweep_as_the_reference(isa: str, rows: int, cols: int, levels: str) -> None:
    """Likewise; and what is left of the pull is what the values say."""
    table = LEVELS[levels]
    before, scales, moments = sweep_case(rows, cols, table)
    found, wanted = ([tensor.clone() for tensor in before] for _ in range(2))
    torch.ops.halfbyte.improve_codes_(*found, scales, moments, table)
    improve_codes_reference(*wanted, scales, moments, table)
    assert float((found[0] != wanted[0]).float().mean()) <= 0.01
    assert cols == 1 or not torch.equal(found[0], before[0])
    same = (found[0] == wanted[0]).all(1)
    assert same.any()
    size = before[2].abs().max()
    torch.testing.assert_close(found[2][same] / size, wanted[2][same] / size, rtol=0, atol=1e-5)
    assert torch.equal(found[1], table[found[0].int()] * scales)
    left = before[2] - (found[1] - before[1]).double() @ moments.double()
    torch.testing.assert_close(found[2] / size, (left / size).float(), rtol=0, atol=1e-5)


def test_sweeps_end_where_no_code_would_change(isa: str) -> None:
    (ranks, values, pull), scales, moments = sweep_case(20, 300, LEVELS["nf4"])
    for _ in range(40):
        before = ranks.clone()
        torch.ops.halfbyte.improve_codes_(ranks, values, pull, scales, moments, LEVELS["nf4"])
    assert torch.equal(ranks, before)


def test_any_number_of_threads(isa: str) -> None:
    threads, found = torch.get_num_threads(), []
    before, scales, moments = sweep_case(700, 300, LEVELS["nf4"])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            swept = [tensor.clone() for tensor in before]
            torch.ops.halfbyte.improve_codes_(*swept, scales, moments, LEVELS["nf4"])
            found.append([*swept, *torch.ops.halfbyte.choose_codes(*feedback_case(128, 700), LEVELS["nf4"])])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_input_that_is_not_contiguous_is_served_too(isa: str) -> None:
    state, scales, factor = feedback_case(8, 16)
    found = torch.ops.halfbyte.choose_codes(state.T.contiguous().T, scales, factor, LEVELS["nf4"])
    assert torch.equal(found[0], torch.ops.halfbyte.choose_codes(state, scales, factor, LEVELS["nf4"])[0])
    (ranks, values, pull), scales, moments = sweep_case(8, 16, LEVELS["nf4"])
    turned, values2 = pull.T.contiguous().T, values.clone()
    ranks2 = ranks.clone()
    torch.ops.halfbyte.improve_codes_(ranks, values, turned, scales, moments, LEVELS["nf4"])
    torch.ops.halfbyte.improve_codes_(ranks2, values2, pull, scales, moments, LEVELS["nf4"])
    assert torch.equal(ranks, ranks2)
