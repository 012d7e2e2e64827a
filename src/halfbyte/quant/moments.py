"""The second moments of a layer's inputs, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from halfbyte.quant.inverse import add_lower_product, add_product, factor_of_inverse_, lower_product, product

DAMPING = 0.01
"""Added to the diagonal of the inputs' second moments, as a part of its mean: columns that hardly ever fire."""
ERROR_COLUMNS = 1024
"""Of a symmetric product, computed together."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a layer's input over the calibration text; factorised once for all layers that it goes to.

    Attributes:
        own: (in, in) float32, x^T x of the inputs x that the quantized model gives the layer.
        cross: (in, in) float32, t^T x, t being the inputs that the wanted model gives it; None where there is `shift`.
        shift: (out, in) float32, ``target (t - x)^T x`` of the only layer's weight: less work than `cross` where it
            has few outputs.
    """

    own: Tensor
    cross: Tensor | None
    shift: Tensor | None = None

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
        """(in,) int64: the inputs, the one that fires most first: the order in which codes are chosen."""
        return self.damped.diagonal().argsort(descending=True)

    @cached_property
    def ordered(self) -> Tensor:
        """(in, in): `damped` in `order`."""
        return self.damped[self.order[:, None], self.order]

    @cached_property
    def inverse_factor(self) -> Tensor:
        """(in, in): the lower Cholesky factor of the inverse of `ordered`."""
        factor = self.ordered.clone()
        factor_of_inverse_(factor)
        return factor

    @cached_property
    def moved(self) -> Tensor:
        """(in, in): what a weight is to be multiplied with to make of x the difference that it makes of t and x."""
        return self._solved(self._drift())

    def wanted(self, target: Tensor) -> Tensor:
        """The weight (out, in) that makes of x what `target` makes of t: the least squares of their difference.

        Args:
            target: (out, in) float32, the layer's weight in the wanted model.
        """
        if self.shift is not None:
            return self._solved(self.shift).add_(target)
        if len(target) >= len(self.own):
            result = target.clone()
            add_product(result, target, self.moved)
            return result
        shift = torch.zeros_like(target)
        add_product(shift, target, self._drift())
        return self._solved(shift).add_(target)

    def _drift(self) -> Tensor:
        assert self.cross is not None
        return self.cross - self.own

    def _solved(self, rows: Tensor) -> Tensor:
        """`rows` (n, in) times the inverse of `damped`."""
        half, result = torch.zeros_like(rows), torch.empty_like(rows)
        add_lower_product(half, rows[:, self.order], self.inverse_factor)
        result[:, self.order] = lower_product(half, self.inverse_factor)
        return result

    def error(self, wrong: Tensor) -> float:
        """The sum of squares of x wrong^T, for `wrong` (out, in), over the text."""
        total = 0.0
        for start in range(0, wrong.shape[1], ERROR_COLUMNS):  # `own` is symmetric: what is above its diagonal, twice
            part = wrong[:, start : start + ERROR_COLUMNS]
            sums = product(wrong[:, start:], self.own[start : start + ERROR_COLUMNS, start:]).mul_(part)
            inside = product(part, self.own[start : start + ERROR_COLUMNS, start : start + ERROR_COLUMNS]).mul_(part)
            total += 2 * float(sums.sum()) - float(inside.sum())
        return total
