"""The native `choose_codes` equals the plain-torch one, on every instruction set and in any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.quant.choose import choose_codes_reference
from halfbyte.quant.codebook import codebook

LEVELS = {"nf4": codebook("nf4", 64).values.sort().values, "32 steps": torch.arange(32.0) - 16}


def case(rows: int, cols: int, *, sweep: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    torch.manual_seed(rows + cols)
    x = torch.randn(3 * rows, rows) @ torch.randn(rows, rows)
    moments = x.T @ x / len(x) + torch.eye(rows)
    scales = torch.randn(rows, 1, 1).expand(rows, -(-cols // 8), 8).reshape(rows, -1)[:, :cols].contiguous()
    scales[rows // 2, : cols // 2] = 0
    if sweep:
        values = torch.randn(rows, cols)
        return moments @ torch.randn(rows, cols), values, scales, moments
    upper = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    return torch.randn(rows, cols), None, scales, upper


@pytest.mark.parametrize("levels", list(LEVELS))
@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 33), (64, 100), (128, 31)])
def test_as_the_reference(isa: str, rows: int, cols: int, sweep: bool, levels: str) -> None:
    """A rounding apart, a code may fall on another side of a midpoint, and those after it follow: none did."""
    state, values, scales, matrix = case(rows, cols, sweep=sweep)
    wide = torch.zeros(rows, rows + 7)  # a part of a larger matrix
    wide[:, :rows] = matrix
    arguments = (state, values, scales, wide[:, :rows], LEVELS[levels])
    ranks, changes = torch.ops.halfbyte.choose_codes(*arguments)
    wanted_ranks, wanted_changes = choose_codes_reference(*arguments)
    assert float((ranks != wanted_ranks).float().mean()) <= 0.01
    same = (ranks == wanted_ranks).all(0)
    torch.testing.assert_close(changes[:, same], wanted_changes[:, same], rtol=1e-3, atol=1e-3)


def test_any_number_of_threads(isa: str) -> None:
    arguments = (*case(128, 700, sweep=True), LEVELS["nf4"])
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(torch.ops.halfbyte.choose_codes(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_input_that_is_not_contiguous_is_served_too(isa: str) -> None:
    state, values, scales, matrix = case(8, 16, sweep=True)
    assert values is not None
    found = torch.ops.halfbyte.choose_codes(state.T.contiguous().T, values, scales, matrix, LEVELS["nf4"])
    assert torch.equal(found[0], torch.ops.halfbyte.choose_codes(state, values, scales, matrix, LEVELS["nf4"])[0])
