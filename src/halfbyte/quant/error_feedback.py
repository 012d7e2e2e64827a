"""Codes chosen column by column, each column's error made up for by those that come after it (GPTQ).

Rounding takes every weight to its nearest value. Here what counts is the layer's output on calibration text:
errors that it does not see may grow, and many small changes that point one way move some codes. Method: arXiv
2210.17323, with columns in the order of their activations' size; the target is first moved by what the layers before
have changed in the input (arXiv 2504.02692).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from halfbyte.config.formats import bits_of, constants_of
from halfbyte.quant.absmax import compress_absmax
from halfbyte.quant.codebook import codebook
from halfbyte.quant.moments import Moments
from halfbyte.quant.nibbles import pack_codes
from halfbyte.quant.on_grid import Chooser, Grid
from halfbyte.quant.scales import fitted_scales
from halfbyte.quant.weight import QuantizedWeight


def ranks_with_feedback(wanted: Tensor, moments: Moments, grid: Grid) -> Tensor:
    """The ranks in `grid` of the weight W for which x W^T is close to x wanted^T.

    Args:
        wanted: (out, in) float32.

    Returns:
        (out, in) uint8.
    """
    chooser = Chooser(moments, wanted.shape)
    return torch.cat([chooser.choose(wanted[some], grid.rows(some), 0).ranks for some in chooser.chunks()])


def round_with_feedback(
    wanted: Tensor, moments: Moments, plain: QuantizedWeight, sweeps: int = 0, *, refit: bool = False
) -> QuantizedWeight:
    """`plain`, a quantized form of `wanted` (out, in), with other codes: W such that x W^T is close to x wanted^T.

    Args:
        refit: choose scales once more, for these codes, and codes for these scales, by `sweeps`, of which there is one
            at least; about twice as long.
    """
    assert sweeps or not refit
    refit = refit and wanted.shape[1] % plain.blocksize == 0
    table, chooser = codebook(plain.quant_type, plain.blocksize), Chooser(moments, wanted.shape)
    grid, ranks = _grid(plain, table.levels), torch.empty(wanted.shape, dtype=torch.uint8)
    error, changes = 0.0, list[Tensor]()
    for some in chooser.chunks():
        chosen = chooser.choose(wanted[some], grid.rows(some), sweeps)
        ranks[some], error = chosen.ranks, error + chosen.error
        if refit:
            changes.append(fitted_scales(chosen.pull, chosen.values, moments.damped, plain.blocksize))
    if refit:
        other = _with_scales(plain, plain.scales_and_offsets()[0] + torch.cat(changes))
        grid, again, other_error = _grid(other, table.levels), torch.empty_like(ranks), 0.0
        for some in chooser.chunks():
            chosen = chooser.choose(wanted[some], grid.rows(some), sweeps, ranks[some])
            again[some], other_error = chosen.ranks, other_error + chosen.error
        if other_error < error:
            plain, ranks = other, again
    codes = torch.cat([table.order[ranks[some].reshape(-1).int()] for some in chooser.chunks()])
    return replace(plain, codes=pack_codes(codes, bits_of(plain.quant_type), table.zero_code))


def _with_scales(plain: QuantizedWeight, scales: Tensor) -> QuantizedWeight:
    if (offsets := plain.scales_and_offsets()[1]) is not None:
        scales = torch.stack([scales, offsets], 1).view(-1)
    if plain.nested_absmax is None:
        return replace(plain, absmax=scales)
    absmax, nested_absmax, offset = compress_absmax(scales, constants_of(plain.quant_type))
    return replace(plain, absmax=absmax, nested_absmax=nested_absmax, nested_offset=offset)


def _grid(weight: QuantizedWeight, levels: Tensor) -> Grid:
    rows, columns = weight.shape

    def by_rows(constants: Tensor) -> Tensor:
        if columns % weight.blocksize:
            constants = constants.repeat_interleave(weight.blocksize)[: rows * columns]
        return constants.view(rows, -1)

    scales, offsets = weight.scales_and_offsets()
    return Grid(levels, by_rows(scales), None if offsets is None else by_rows(offsets))
