"""Several adapters as one.

Their sum is exact only with all ranks kept (`cat`); `svd` is the nearest of a smaller rank. `linear` sums the A and
the B apart, and (B1 + B2)(A1 + A2) has the products B1 A2 and B2 A1 too, which nobody trained. The others prune the
updates before they are added: PEFT's functions, on whole updates (of its names, those that do not end in `_svd` act on
A and B apart, and are not offered).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft.utils import merge_utils
from torch import Tensor

from halfbyte.errors import AdapterError, ConfigError, NumericsError
from halfbyte.merge.update import Update, Updates, Weighted, by_layer, side_by_side
from halfbyte.model.load import Progress

_PRUNED: dict[str, Callable[[list[Tensor], Tensor, float], Tensor]] = {
    "ties_svd": merge_utils.ties, "dare_linear_svd": merge_utils.dare_linear, "dare_ties_svd": merge_utils.dare_ties,
    "magnitude_prune_svd": merge_utils.magnitude_prune,
}  # fmt: skip
SUMS = ("cat", "svd", "linear")
"""Ways that are to give the sum of the updates."""
WAYS = (*SUMS, *_PRUNED)
"""By PEFT's names."""


@dataclass(frozen=True, kw_only=True)
class Combine:
    """How updates of several adapters become one.

    Attributes:
        how: one of `WAYS`.
        rank: of the result, where it is chosen; 0: the largest of the adapters'.
        density: share of an update's values that is kept where they are pruned.
        seed: of what is pruned at random.

    Raises:
        ConfigError: an unknown way, or a number that is not for it.
    """

    how: str = "cat"
    rank: int = 0
    density: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in WAYS:
            raise ConfigError(f"{self.how!r} is not a choice", where="--combine", fix=f"Choose {', '.join(WAYS)}")
        if self.rank and not self.how.endswith("svd"):
            raise ConfigError(f"is not for {self.how}", where="--rank", fix="Choose --combine svd")
        if not 0 < self.density < 1:
            raise ConfigError(f"{self.density:g} is not between 0 and 1", where="--density", fix="Give 0.2")

    @property
    def is_dense(self) -> bool:
        """Whether whole updates are made, one layer's at a time."""
        return self.how in _PRUNED

    def __str__(self) -> str:
        return self.how + (f", {self.density:g} of the values" if self.is_dense else "")


def combined(parts: Weighted, combine: Combine, on_progress: Progress | None = None) -> Updates:
    """The updates of `parts` as those of one adapter.

    Raises:
        AdapterError: their ranks differ, for `linear`.
        NumericsError: a result is not finite.
    """
    layers = by_layer(parts)
    result = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(combine.seed)
        for done, (name, shares) in enumerate(layers.items()):
            if on_progress:
                on_progress(done, len(layers), name)
            result[name] = _one(name, shares, combine)
            if not all(factor.isfinite().all() for factor in (result[name].a, result[name].b)):
                raise NumericsError("the combined update is not finite", where=name, fix="Give smaller weights")
    return result


def _one(name: str, shares: Sequence[tuple[float, Update]], combine: Combine) -> Update:
    if combine.how == "cat":
        return side_by_side(shares)
    if combine.how == "linear":
        return _linear(name, shares)
    rank = combine.rank or max(len(update.a) for _, update in shares)
    if combine.how == "svd":
        return _nearest(side_by_side(shares), rank)
    weights = torch.tensor([weight for weight, _ in shares])
    whole = _PRUNED[combine.how]([update.rows() for _, update in shares], weights, combine.density)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    return _largest(u, s, v, rank)


def _linear(name: str, shares: Sequence[tuple[float, Update]]) -> Update:
    """PEFT's: A and B are summed apart, each with the root of weight and scaling; the sign is with A."""
    if len({len(update.a) for _, update in shares}) > 1:
        ranks = ", ".join(str(len(update.a)) for _, update in shares)
        raise AdapterError(f"ranks {ranks} cannot be added", where=name, fix="Choose --combine cat or svd")
    roots = [math.sqrt(abs(weight * update.scale)) for weight, update in shares]
    a = sum(math.copysign(root, weight) * update.a for root, (weight, update) in zip(roots, shares, strict=True))
    b = sum(root / update.scale * update.b for root, (_, update) in zip(roots, shares, strict=True))
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return Update(a, b)


def _nearest(update: Update, rank: int) -> Update:
    """The update of `rank` that is nearest to `update`, from its factors alone."""
    left, right = torch.linalg.qr(update.b.double()), torch.linalg.qr(update.a.double().T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T)
    return _largest(left.Q @ u, s, v @ right.Q.T, rank)


def _largest(u: Tensor, s: Tensor, v: Tensor, rank: int) -> Update:
    root = s[:rank].sqrt()
    return Update((root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float())
