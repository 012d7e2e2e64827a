"""A merged model in few bits whose update survives: rounded layer by layer, as text goes through."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.merge.fold import Fold
from halfbyte.model.lent import LentModel
from halfbyte.model.load import Progress
from halfbyte.model.side_by_side import Multiply, run_side_by_side
from halfbyte.plan.merging import CHUNK_TOKENS
from halfbyte.quant.moments import Moments

REMEMBERED = 8
"""4-bit weights of the base kept while text goes through a decoder layer several times: those of a common one."""


@dataclass(frozen=True, kw_only=True)
class Survived:
    """What became of the update of one layer.

    Attributes:
        name: of the parameter.
        weights: share of the update in the weights, ``<new - base, update> / <update, update>``.
        outputs: the same of the layer's outputs on the calibration text.
        error: the norm of what is wrong with these outputs, as a part of the update's.
    """

    name: str
    weights: float
    outputs: float
    error: float


class Output(Protocol):
    """What is written, parameter by parameter in any order."""

    def keep(self, name: str) -> None:
        """Write a parameter that no text is needed for."""

    def nearest(self, name: str, target: Tensor) -> None:
        """Write `target` (out, in) float32, which no text has passed."""

    def round(self, name: str, target: Tensor, moments: Moments) -> Callable[[], Tensor]:
        """Write W such that x W^T is close to t target^T; gives W, decoded, whenever it is called."""


class FeedbackWriter:
    """Runs calibration text through the trained model and the one that is being written, side by side; every layer is
    rounded when its inputs are known, and the text goes on through what was written.

    Args:
        names: parameters to be rounded, some of the base's targets.
    """

    def __init__(
        self, fold: Fold, output: Output, names: Collection[str], on_progress: Progress | None = None
    ) -> None:
        self._fold, self._output, self._names, self._on_progress = fold, output, names, on_progress
        self._done: dict[str, None] = {}
        self.survived: list[Survived] = []

    def write(self, model: LentModel, ids: Tensor, counts: Tensor) -> None:
        """Write every parameter.

        Args:
            ids: (sequences, tokens) int64, padded at the end.
            counts: the same shape: which tokens are text.
        """
        base = self._fold.base
        for name in base.names:
            if name not in self._names:
                self._output.keep(name)
        trained = Fold(replace(base, remembered=REMEMBERED), self._fold.updates, tables=self._fold.tables)
        run_side_by_side(model, ids, counts, trained.weight, self._names, self._round, chunk_tokens=CHUNK_TOKENS)
        for name in base.names:
            if name in self._names and name not in self._done:
                self._output.nearest(name, self._fold.whole(name))

    def _round(self, name: str, moments: Moments) -> Multiply:
        decode = self._output.round(name, self._fold.whole(name), moments)
        self._note(name, decode(), moments.own)
        self._done[name] = None
        if self._on_progress:
            self._on_progress(len(self._done), len(self._names), name)
        return lambda x: torch.ops.halfbyte.linear_frozen(x, decode(), None)

    def _note(self, name: str, decoded: Tensor, own: Tensor) -> None:
        update = self._fold.updates.get(name)
        if update is None:
            return
        base = self._fold.base.quantized(name).dequantize(torch.float32)
        wanted = update.rows() if update.magnitude is None else update.add_to(base.clone()) - base
        change = decoded - base
        seen = wanted @ own
        size = float((seen * wanted).sum())
        wrong = change - wanted
        self.survived.append(Survived(
            name=name, weights=float((change * wanted).sum() / (wanted * wanted).sum()),
            outputs=float((change * seen).sum()) / size, error=(float((wrong @ own * wrong).sum()) / size) ** 0.5,
        ))  # fmt: skip
