"""A merged model in bitsandbytes' 4-bit format whose update survives: rounded layer by layer, as text goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from halfbyte.checkpoint.shard_writer import ShardWriter
from halfbyte.config import QuantConfig
from halfbyte.merge.fold import Fold
from halfbyte.merge.sixteen import kept
from halfbyte.model.lent import LentModel
from halfbyte.model.load import Progress
from halfbyte.model.side_by_side import run_side_by_side
from halfbyte.plan.merging import CHUNK_TOKENS
from halfbyte.quant import QuantizedWeight, quantize_slices
from halfbyte.quant.error_feedback import Moments, round_with_feedback

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


class FourBitWriter:
    """Runs calibration text through the trained model and the one that is being written, side by side; every layer is
    rounded when its inputs are known, and the text goes on through what was written.

    Args:
        recipe: codebook, block size, double quantization.
    """

    def __init__(
        self, fold: Fold, recipe: QuantConfig, shards: ShardWriter, on_progress: Progress | None = None
    ) -> None:
        self._fold, self._recipe, self._shards, self._on_progress = fold, recipe, shards, on_progress
        self._done: dict[str, None] = {}
        self.survived: list[Survived] = []

    def write(self, model: LentModel, ids: Tensor, counts: Tensor) -> None:
        """Write every tensor.

        Args:
            ids: (sequences, tokens) int64, padded at the end.
            counts: the same shape: which tokens are text.
        """
        base = self._fold.base
        for name in base.names:
            if name not in base.targets:
                self._shards.add(name, kept(self._fold, name))
        trained = Fold(replace(base, remembered=REMEMBERED), self._fold.updates)
        run_side_by_side(model, ids, counts, trained.weight, base.targets, self._round, chunk_tokens=CHUNK_TOKENS)
        for name in base.names:
            if name in base.targets and name not in self._done:  # the text did not pass it
                self._write(name, self._nearest(name, self._fold.whole(name)))

    def _round(self, name: str, moments: Moments) -> Callable[[], Tensor]:
        target = self._fold.whole(name)
        weight = round_with_feedback(target, moments, self._nearest(name, target))
        decoded = weight.dequantize(torch.float32)
        self._note(name, decoded, moments.own)
        self._write(name, weight)
        return partial(weight.dequantize, torch.float32)

    def _note(self, name: str, decoded: Tensor, own: Tensor) -> None:
        update = self._fold.updates.get(name)
        if update is None:
            return
        wanted, base = update.rows(), self._fold.base.quantized(name).dequantize(torch.float32)
        change = decoded - base
        seen = wanted @ own
        size = float((seen * wanted).sum())
        wrong = change - wanted
        self.survived.append(Survived(
            name=name, weights=float((change * wanted).sum() / (wanted * wanted).sum()),
            outputs=float((change * seen).sum()) / size, error=(float((wrong @ own * wrong).sum()) / size) ** 0.5,
        ))  # fmt: skip

    def _nearest(self, name: str, target: Tensor) -> QuantizedWeight:
        return quantize_slices([target], tuple(target.shape), target.dtype, self._recipe, name=name)

    def _write(self, name: str, weight: QuantizedWeight) -> None:
        self._done[name] = None
        if self._on_progress:
            self._on_progress(len(self._done), len(self._fold.base.targets), name)
        weight = replace(weight, dtype=self._fold.base.dtype())
        self._shards.add(name, weight.codes.view(-1, 1))
        for key, tensor in weight.bnb_tensors().items():
            self._shards.add(f"{name}.{key}", tensor)
