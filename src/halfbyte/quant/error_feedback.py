"""Codes chosen column by column, each column's error made up for by those that come after it (GPTQ).

Rounding takes every weight to its nearest value. Here what counts is the layer's output on calibration text:
errors that it does not see may grow, and many small changes that point one way move some codes. Method: arXiv
2210.17323, with columns in the order of their activations' size; the target is first moved by what the layers before
have changed in the input (arXiv 2504.02692).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from halfbyte.config.formats import bits_of, constants_of
from halfbyte.quant.absmax import compress_absmax
from halfbyte.quant.choose import MOST
from halfbyte.quant.codebook import codebook
from halfbyte.quant.nibbles import pack_codes
from halfbyte.quant.scales import fitted_scales
from halfbyte.quant.weight import QuantizedWeight

DAMPING = 0.01
"""Added to the diagonal of the inputs' second moments, as a part of its mean: columns that hardly ever fire."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a layer's input over the calibration text; factorised once for all layers that it goes to.

    Attributes:
        own: (in, in) float32, x^T x of the inputs x that the quantized model gives the layer.
        cross: (in, in) float32, t^T x, t being the inputs that the wanted model gives it.
    """

    own: Tensor
    cross: Tensor

    @cached_property
    def damped(self) -> Tensor:
        """(in, in): `own` with an input that never fires at 1, and DAMPING added."""
        damped = self.own.clone()
        dead = damped.diagonal() <= 0
        damped.diagonal()[dead] = 1.0
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        return damped

    @cached_property
    def factor(self) -> Tensor:
        """(in, in): the lower Cholesky factor of `damped`."""
        factor: Tensor = torch.linalg.cholesky(self.damped)
        return factor

    @cached_property
    def order(self) -> Tensor:
        """(in,) int64: the inputs, the one that fires most first."""
        return self.damped.diagonal().argsort(descending=True)

    @cached_property
    def inverse_factor(self) -> Tensor:
        """(in, in): the upper Cholesky factor of the inverse of `damped`, both in `order`."""
        backwards = self.order.flip(0)
        root = torch.linalg.cholesky(self.damped[backwards][:, backwards]).flip(0, 1)  # upper, times its transpose
        factor: Tensor = torch.linalg.solve_triangular(root, torch.eye(len(root)), upper=True)
        return factor.contiguous()

    def wanted(self, target: Tensor) -> Tensor:
        """The weight (out, in) that makes of x what `target` makes of t: the least squares of their difference."""
        shift = torch.ops.halfbyte.product(target, (self.cross - self.own).T)
        return target + torch.cholesky_solve(shift.T, self.factor).T

    def error(self, wrong: Tensor) -> float:
        """The sum of squares of x wrong^T, for `wrong` (out, in), over the text."""
        return float((torch.ops.halfbyte.product(wrong, self.own) * wrong).sum())


@dataclass(frozen=True, eq=False)
class Grid:
    """What a weight may become: ``levels[rank] * scale + offset``.

    Attributes:
        levels: (k,) float32, ascending, at most 256.
        scales: (out, in) float32 of either sign; where it is 0 the weight becomes its offset.
        offsets: (out, in) float32, or None for none.
    """

    levels: Tensor
    scales: Tensor
    offsets: Tensor | None = None

    def taken(self, order: Tensor) -> Grid:
        """The grid of the transposed weight (in, out), its rows in `order`."""
        offsets = None if self.offsets is None else self.offsets.T[order].contiguous()
        return Grid(self.levels, self.scales.T[order].contiguous(), offsets)


def ranks_with_feedback(
    wanted: Tensor, moments: Moments, grid: Grid, sweeps: int = 0, ranks: Tensor | None = None
) -> Tensor:
    """The ranks in `grid` of the weight W for which x W^T is close to x wanted^T.

    Args:
        wanted: (out, in) float32.
        sweeps: over all columns afterwards, each given the best code beside all others: half as long again, for each.
        ranks: (out, in) uint8, to begin these sweeps at.

    Returns:
        (out, in) uint8.
    """
    order = moments.order
    columns, grid = wanted.T[order].contiguous(), grid.taken(order)
    if ranks is None:
        found = _ranks(columns.clone() if sweeps else columns, moments.inverse_factor, grid)
    else:
        found = ranks.T[order].contiguous()
    if sweeps:
        _improve(found, columns, moments.damped[order][:, order], grid, sweeps)
    back = torch.empty_like(found)
    back[order] = found
    return back.T


def round_with_feedback(
    wanted: Tensor, moments: Moments, plain: QuantizedWeight, sweeps: int = 0, *, refit: bool = False
) -> QuantizedWeight:
    """`plain`, a quantized form of `wanted` (out, in), with other codes: W such that x W^T is close to x wanted^T.

    Args:
        refit: choose scales once more, for these codes, and codes for these scales, by `sweeps`; about twice as long.
    """
    table = codebook(plain.quant_type, plain.blocksize)
    levels = table.levels
    grid = _grid(plain, levels)
    ranks = ranks_with_feedback(wanted, moments, grid, sweeps)
    if refit and wanted.shape[1] % plain.blocksize == 0:
        left = wanted if grid.offsets is None else wanted - grid.offsets
        scales = fitted_scales(left, levels[ranks.int()], moments.damped, plain.blocksize)
        other = _with_scales(plain, scales)
        other_grid = _grid(other, levels)
        other_ranks = ranks_with_feedback(wanted, moments, other_grid, sweeps, ranks)
        if _error(wanted, other_ranks, other_grid, moments) < _error(wanted, ranks, grid, moments):
            plain, ranks = other, other_ranks
    codes = table.order[ranks.reshape(-1).int()]
    return replace(plain, codes=pack_codes(codes, bits_of(plain.quant_type), table.zero_code))


def _with_scales(plain: QuantizedWeight, scales: Tensor) -> QuantizedWeight:
    if (offsets := plain.scales_and_offsets()[1]) is not None:
        scales = torch.stack([scales, offsets], 1).view(-1)
    if plain.nested_absmax is None:
        return replace(plain, absmax=scales)
    absmax, nested_absmax, offset = compress_absmax(scales, constants_of(plain.quant_type))
    return replace(plain, absmax=absmax, nested_absmax=nested_absmax, nested_offset=offset)


def _grid(weight: QuantizedWeight, levels: Tensor) -> Grid:
    """What each weight (out, in) may be decoded to."""
    count = weight.shape[0] * weight.shape[1]
    scales, offsets = (
        None if each is None else each.repeat_interleave(weight.blocksize)[:count].view(weight.shape)
        for each in weight.scales_and_offsets()
    )
    assert scales is not None
    return Grid(levels, scales, offsets)


def _error(wanted: Tensor, ranks: Tensor, grid: Grid, moments: Moments) -> float:
    wrong = wanted - grid.levels[ranks.int()] * grid.scales
    if grid.offsets is not None:
        wrong -= grid.offsets
    return float((torch.ops.halfbyte.product(wrong, moments.damped) * wrong).sum())


def _ranks(columns: Tensor, upper: Tensor, grid: Grid) -> Tensor:
    """(in, out) uint8, of `columns` (in, out), which are used up."""
    if grid.offsets is not None:
        columns -= grid.offsets
    ranks = torch.empty(columns.shape, dtype=torch.uint8)
    for start in range(0, len(columns), MOST):
        stop = min(start + MOST, len(columns))
        part = slice(start, stop)
        ranks[part], errors = torch.ops.halfbyte.choose_codes(
            columns[part], None, grid.scales[part], upper[part, part], grid.levels
        )
        if stop < len(columns):
            columns[stop:] -= torch.ops.halfbyte.product(upper[part, stop:].T, errors.T)
    return ranks


def _improve(ranks: Tensor, wanted: Tensor, damped: Tensor, grid: Grid, sweeps: int) -> None:
    """Coordinate descent on the codes, in place: `ranks` (in, out) of `wanted` (in, out), which is used up."""
    if grid.offsets is not None:
        wanted -= grid.offsets
    values = grid.levels[ranks.int()] * grid.scales
    for _ in range(sweeps):
        pull = torch.ops.halfbyte.product(damped, (wanted - values).T)
        for start in range(0, len(values), MOST):
            stop = min(start + MOST, len(values))
            part = slice(start, stop)
            ranks[part], changes = torch.ops.halfbyte.choose_codes(
                pull[part], values[part], grid.scales[part], damped[part, part], grid.levels
            )
            values[part] += changes
            if stop < len(values):
                pull[stop:] -= torch.ops.halfbyte.product(damped[stop:, part], changes.T)
