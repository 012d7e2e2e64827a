"""Codes chosen column by column, each column's error made up for by those that come after it (GPTQ).

Rounding takes every weight to its nearest value. Here what counts is the layer's output on calibration text:
errors that it does not see may grow, and many small changes that point one way move some codes. Method: arXiv
2210.17323, with columns in the order of their activations' size; the target is first moved by what the layers before
have changed in the input (arXiv 2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from halfbyte.config.formats import bits_of, constants_of
from halfbyte.quant.absmax import compress_absmax
from halfbyte.quant.choose import MOST
from halfbyte.quant.codebook import codebook
from halfbyte.quant.inverse import add_lower_product, add_product, inverse_cholesky, lower_product, product
from halfbyte.quant.nibbles import pack_codes
from halfbyte.quant.scales import fitted_scales
from halfbyte.quant.weight import QuantizedWeight

DAMPING = 0.01
"""Added to the diagonal of the inputs' second moments, as a part of its mean: columns that hardly ever fire."""
ERROR_COLUMNS = 1024
"""Of a symmetric product, computed together."""


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
    def ordered(self) -> Tensor:
        """(in, in): `damped` in `order`."""
        return self.damped[self.order[:, None], self.order]

    @cached_property
    def inverse_factor(self) -> Tensor:
        """(in, in): the lower Cholesky factor of the inverse of `ordered`."""
        return inverse_cholesky(self.ordered.flip(0, 1)).T.flip(0, 1).contiguous()

    @cached_property
    def moved(self) -> Tensor:
        """(in, in): what a weight is to be multiplied with to make of x the difference that it makes of t and x."""
        return self._solved(self.cross - self.own)

    def wanted(self, target: Tensor) -> Tensor:
        """The weight (out, in) that makes of x what `target` makes of t: the least squares of their difference."""
        if len(target) >= len(self.own):
            result = target.clone()
            add_product(result, target, self.moved)
            return result
        shift = torch.zeros_like(target)
        add_product(shift, target, self.cross - self.own)
        return self._solved(shift).add_(target)

    def _solved(self, rows: Tensor) -> Tensor:
        """`rows` (n, in), used up, times the inverse of `damped`."""
        half = torch.zeros_like(rows)
        add_lower_product(half, rows[:, self.order], self.inverse_factor)
        rows[:, self.order] = lower_product(half, self.inverse_factor)
        return rows

    def error(self, wrong: Tensor) -> float:
        """The sum of squares of x wrong^T, for `wrong` (out, in), over the text."""
        total = 0.0
        for start in range(0, wrong.shape[1], ERROR_COLUMNS):  # `own` is symmetric: what is above its diagonal, twice
            part = wrong[:, start : start + ERROR_COLUMNS]
            sums = product(wrong[:, start:], self.own[start : start + ERROR_COLUMNS, start:]).mul_(part)
            inside = product(part, self.own[start : start + ERROR_COLUMNS, start : start + ERROR_COLUMNS]).mul_(part)
            total += 2 * float(sums.sum()) - float(inside.sum())
        return total


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
        offsets = None if self.offsets is None else self.offsets.T[order]
        return Grid(self.levels, self.scales.T[order], offsets)


def ranks_with_feedback(wanted: Tensor, moments: Moments, grid: Grid, sweeps: int = 0) -> Tensor:
    """The ranks in `grid` of the weight W for which x W^T is close to x wanted^T.

    Args:
        wanted: (out, in) float32.
        sweeps: over all columns afterwards, each given the best code beside all others: half as long again, for each.

    Returns:
        (out, in) uint8.
    """
    return _chosen(wanted, moments, grid, sweeps).ranks


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Codes, and after sweeps what they leave.

    Attributes:
        ranks: (out, in) uint8.
        pull: (out, in) float32, what is missing of the wanted weight times the inputs' second moments.
        error: the sum of squares of what is missing of the outputs.
    """

    ranks: Tensor
    pull: Tensor
    error: float = 0.0


def _chosen(wanted: Tensor, moments: Moments, grid: Grid, sweeps: int, ranks: Tensor | None = None) -> _Chosen:
    """Codes for `wanted` (out, in), after `sweeps`, which begin at `ranks` where given."""
    order = moments.order
    columns, grid = wanted.T[order], grid.taken(order)
    if grid.offsets is not None:
        columns -= grid.offsets
    if ranks is None:
        found = _ranks(columns.clone() if sweeps else columns, moments.inverse_factor, grid)
    else:
        found = ranks.T[order]

    def back(ordered: Tensor) -> Tensor:
        rows = torch.empty_like(ordered)
        rows[order] = ordered
        return rows.T.contiguous()

    if not sweeps:
        return _Chosen(back(found), torch.empty(0))
    pull, error = _improve(found, columns, moments.ordered, grid, sweeps)
    return _Chosen(back(found), back(pull), error)


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
    table = codebook(plain.quant_type, plain.blocksize)
    left, grid = _on_grid(wanted, plain, table.levels)
    first = _chosen(left, moments, grid, sweeps)
    ranks = first.ranks
    if refit:
        change = fitted_scales(first.pull, table.levels[ranks.int()], moments.damped, plain.blocksize)
        other = _with_scales(plain, plain.scales_and_offsets()[0] + change)
        left, grid = _on_grid(wanted, other, table.levels)
        second = _chosen(left, moments, grid, sweeps, ranks)
        if second.error < first.error:
            plain, ranks = other, second.ranks
    codes = table.order[ranks.reshape(-1).int()]
    return replace(plain, codes=pack_codes(codes, bits_of(plain.quant_type), table.zero_code))


def _with_scales(plain: QuantizedWeight, scales: Tensor) -> QuantizedWeight:
    if (offsets := plain.scales_and_offsets()[1]) is not None:
        scales = torch.stack([scales, offsets], 1).view(-1)
    if plain.nested_absmax is None:
        return replace(plain, absmax=scales)
    absmax, nested_absmax, offset = compress_absmax(scales, constants_of(plain.quant_type))
    return replace(plain, absmax=absmax, nested_absmax=nested_absmax, nested_offset=offset)


def _on_grid(wanted: Tensor, weight: QuantizedWeight, levels: Tensor) -> tuple[Tensor, Grid]:
    """(out, in): what is wanted of codes and scales alone, `wanted` less the offsets that `weight` has; their grid."""
    scales, offsets = weight.scales_and_offsets()

    def each(constants: Tensor) -> Tensor:
        return constants.repeat_interleave(weight.blocksize)[: wanted.numel()].view(wanted.shape)

    return wanted if offsets is None else wanted - each(offsets), Grid(levels, each(scales))


def _ranks(columns: Tensor, lower: Tensor, grid: Grid) -> Tensor:
    """(in, out) uint8, of `columns` (in, out), which are used up."""
    ranks, errors = torch.empty(columns.shape, dtype=torch.uint8), torch.empty_like(columns)

    def choose(part: slice) -> None:
        ranks[part], errors[part] = torch.ops.halfbyte.choose_codes(
            columns[part], None, grid.scales[part], lower[part, part].T, grid.levels
        )

    def pass_on(done: slice, left: slice) -> None:
        add_product(columns[left], lower[left, done], errors[done], -1.0)

    _by_halves(0, len(columns), choose, pass_on)
    return ranks


def _improve(ranks: Tensor, wanted: Tensor, damped: Tensor, grid: Grid, sweeps: int) -> tuple[Tensor, float]:
    """Coordinate descent on the codes, in place: `ranks` (in, out) of `wanted` (in, out), which is used up.

    Returns:
        ``damped wrong^T`` (in, out) of what is wrong at last, and the error: the sum of ``wrong damped wrong^T``.
    """
    values = grid.levels[ranks.int()].mul_(grid.scales)
    wrong, changes = wanted.sub_(values), torch.empty_like(values)
    pull = torch.zeros_like(wrong)
    add_product(pull, damped, wrong)

    def choose(part: slice) -> None:
        ranks[part], changes[part] = torch.ops.halfbyte.choose_codes(
            pull[part], values[part], grid.scales[part], damped[part, part], grid.levels
        )
        pass_on(part, part)

    def pass_on(done: slice, left: slice) -> None:
        add_product(pull[left], damped[left, done], changes[done], -1.0)

    for _ in range(sweeps):
        _by_halves(0, len(values), choose, pass_on, pass_on)
        values += changes
        wrong -= changes
    return pull, float(wrong.mul_(pull).sum())


def _by_halves(
    start: int, stop: int, choose: Callable[[slice], None], *pass_on: Callable[[slice, slice], None]
) -> None:
    """`choose` for MOST columns at a time, in order. What a half has changed is passed on to the other by one product:
    first from the first to the second; with two functions back as well.
    """
    if stop - start <= MOST:
        choose(slice(start, stop))
        return
    middle = start + -(-(stop - start) // (2 * MOST)) * MOST
    halves = slice(start, middle), slice(middle, stop)
    _by_halves(start, middle, choose, *pass_on)
    pass_on[0](*halves)
    _by_halves(middle, stop, choose, *pass_on)
    if len(pass_on) > 1:
        pass_on[1](halves[1], halves[0])
