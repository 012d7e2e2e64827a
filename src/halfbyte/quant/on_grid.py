"""Codes of a weight on a given grid: error feedback column by column, then sweeps over the columns.

Some rows at a time, in the same memory: rows know nothing of each other, and to touch fresh memory takes longer than
most of what is done with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.quant.choose import MOST
from halfbyte.quant.inverse import add_product, product
from halfbyte.quant.moments import Moments

NUMBERS = 1 << 23
"""Weights that are worked on at a time."""


@dataclass(frozen=True, eq=False)
class Grid:
    """What a weight (out, in) may become: ``levels[rank] * scale + offset``.

    Attributes:
        levels: (k,) float32, ascending, at most 256.
        scales: (out, blocks) float32 of either sign, each of in / blocks weights; where 0 they become the offset.
        offsets: the same shape, or None for none.
    """

    levels: Tensor
    scales: Tensor
    offsets: Tensor | None = None

    def rows(self, some: slice) -> Grid:
        """The grid of some rows."""
        return Grid(self.levels, self.scales[some], None if self.offsets is None else self.offsets[some])


@dataclass(frozen=True, eq=False)
class Chosen:
    """Codes of some rows, and after sweeps what they leave.

    Attributes:
        ranks: (rows, in) uint8.
        values: (rows, in) float32, the levels of these.
        pull: (rows, in) float32, what is missing of the wanted weight times the inputs' second moments. This and the
            values are overwritten by what is chosen next.
        error: the sum of squares of what is missing of the outputs.
    """

    ranks: Tensor
    values: Tensor
    pull: Tensor
    error: float = 0.0


class Chooser:
    """Chooses codes for weights (out, in) of one shape, whose inputs have these `moments`."""

    def __init__(self, moments: Moments, shape: torch.Size) -> None:
        self._moments, self._shape = moments, shape
        self._order, self._back = moments.order, moments.order.argsort()
        self._rows = min(max(NUMBERS // shape[1], 1), shape[0])
        self._memory = [torch.empty(self._rows * shape[1]) for _ in range(5)]

    def chunks(self) -> Iterator[slice]:
        """The rows that are worked on together."""
        return (slice(start, start + self._rows) for start in range(0, self._shape[0], self._rows))

    def choose(self, wanted: Tensor, grid: Grid, sweeps: int, ranks: Tensor | None = None) -> Chosen:
        """Codes for `wanted` (rows, in), some rows, after `sweeps`, which begin at `ranks` where given."""
        shape, levels, order = wanted.shape, grid.levels, self._order
        left, scales, values, wrong, _ = (memory[: wanted.numel()].view(shape) for memory in self._memory)
        torch.index_select(wanted, 1, order, out=left)
        blocks = order // (shape[1] // grid.scales.shape[1])
        if grid.offsets is not None:
            left -= torch.index_select(grid.offsets, 1, blocks, out=scales)
        torch.index_select(grid.scales, 1, blocks, out=scales)
        ranks = self._with_feedback(left, scales, levels) if ranks is None else ranks.index_select(1, order)
        if not sweeps:
            return Chosen(ranks.index_select(1, self._back), torch.empty(0), torch.empty(0))
        self._look_up(levels, ranks, values).mul_(scales)
        pull = product(torch.sub(left, values, out=wrong), self._moments.ordered)
        for _ in range(sweeps):
            torch.ops.halfbyte.improve_codes_(ranks, values, pull, scales, self._moments.ordered, levels)
        error = float(torch.sub(left, values, out=wrong).mul_(pull).sum())
        ranks = ranks.index_select(1, self._back)
        pull = torch.index_select(pull, 1, self._back, out=wrong)
        return Chosen(ranks, self._look_up(levels, ranks, values), pull, error)

    def _look_up(self, levels: Tensor, ranks: Tensor, out: Tensor) -> Tensor:
        index = self._memory[4].view(torch.int32)[: ranks.numel()].copy_(ranks.reshape(-1))
        torch.index_select(levels, 0, index, out=out.view(-1))
        return out

    def _with_feedback(self, wanted: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
        """(rows, in) uint8, of `wanted` (rows, in), columns in order: each column's error goes to those after it."""
        lower, turned = self._moments.inverse_factor, wanted.T.shape
        columns, by_column, errors = (memory[: wanted.numel()].view(turned) for memory in self._memory[2:])
        columns.copy_(wanted.T)
        by_column.copy_(scales.T)
        ranks = torch.empty(turned, dtype=torch.uint8)

        for part, later in _in_turn(0, len(columns)):
            if later is None:
                ranks[part], errors[part] = torch.ops.halfbyte.choose_codes(
                    columns[part], by_column[part], lower[part, part].T, levels
                )
            else:
                add_product(columns[later], lower[later, part], errors[part], -1.0)
        return ranks.T.contiguous()


def _in_turn(start: int, stop: int) -> Iterator[tuple[slice, slice | None]]:
    """Columns, MOST at a time; when those of a half are done, they and the other half, to which their errors go."""
    if stop - start <= MOST:
        yield slice(start, stop), None
        return
    middle = start + -(-(stop - start) // (2 * MOST)) * MOST
    yield from _in_turn(start, middle)
    yield slice(start, middle), slice(middle, stop)
    yield from _in_turn(middle, stop)
