"""The tensors of a calibrated model, each layer's weight written when its inputs are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from halfbyte.calibrate.start import start_of
from halfbyte.checkpoint.shard_writer import Pieces, ShardWriter
from halfbyte.model.base_hash import BaseHash
from halfbyte.model.lent import LentModel
from halfbyte.model.load import Progress
from halfbyte.model.quantize import Unquantized
from halfbyte.model.read import read_unquantized, unquantized_slices
from halfbyte.model.side_by_side import Multiply, run_side_by_side
from halfbyte.plan.merging import CHUNK_TOKENS
from halfbyte.quant import QuantizedWeight, quantize_slices
from halfbyte.quant.error_feedback import round_with_feedback
from halfbyte.quant.moments import Moments

SWEEPS = 3
"""Over the columns after error feedback: the third takes off 1 % of the outputs' error, the fourth a third of that."""
MEASURED_ROWS = 512
"""Of a weight, that its error is measured on: all of them would take a tenth of the time."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What quantizing changed in a layer, the start aside.

    Attributes:
        name: of the parameter.
        weights: squared error relative to the weights' squares.
        outputs: the same of the layer's outputs on the calibration text, from the inputs of the quantized model; of
            outputs evenly spread, MEASURED_ROWS and more.
        nearest: `outputs` of the nearest codes to the same scales.
    """

    name: str
    weights: float
    outputs: float
    nearest: float


class FourBitWriter:
    """Writes tensors of `job` into `shards`, each hashed into `base`."""

    def __init__(
        self, job: Unquantized, shards: ShardWriter, base: BaseHash, on_progress: Progress | None = None
    ) -> None:
        self._job, self._shards, self._base, self._on_progress = job, shards, base, on_progress
        self.done: dict[str, None] = {}
        self._bits, self._weights = 0, 0

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers, scales included."""
        return self._bits / max(self._weights, 1)

    def write_others(self) -> None:
        """All tensors that are not quantized, as they are stored."""
        job, targets = self._job, {f"{name}.weight" for name in self._job.targets}
        for name, stored in job.names.items():
            if name not in targets:
                slices = unquantized_slices(job.reader, stored, job.model.get_parameter(name), job.source.label)
                slices = self._base.through(name, slices)
                self._shards.add(
                    job.file_name(name), Pieces(job.reader.dtype(stored), job.reader.shape(stored), slices)
                )

    def stored(self, name: str) -> Tensor:
        """A parameter as it is stored."""
        job = self._job
        return read_unquantized(job.reader, job.names[name], job.model.get_parameter(name), job.source.label)

    def target(self, name: str) -> Tensor:
        """A weight to quantize, (out, in) float32."""
        module = self._job.model.get_submodule(name.rpartition(".")[0])
        weight = self.stored(name).float()
        return weight.T.contiguous() if isinstance(module, Conv1D) else weight

    def nearest(self, name: str, target: Tensor, importance: Tensor | None = None) -> QuantizedWeight:
        """`target` in 4 bits, each weight the nearest code; of the dtype that `name` is stored in."""
        job = self._job
        return quantize_slices(
            [target], tuple(target.shape), job.reader.dtype(job.names[name]), job.quant_of(name.rpartition(".")[0]),
            name=name, importance=importance,
        )  # fmt: skip

    def add(self, name: str, weight: QuantizedWeight) -> None:
        """Write a weight."""
        self.done[name] = None
        self._bits += 8 * weight.nbytes
        self._weights += prod(weight.shape)
        if self._on_progress:
            self._on_progress(len(self.done), len(self._job.targets), name)
        self._base.add(name, weight.codes, weight.absmax, weight.nested_absmax)
        written = self._job.file_name(name)
        self._shards.add(written, weight.codes.view(-1, 1))
        for key, tensor in weight.bnb_tensors().items():
            self._shards.add(f"{written}.{key}", tensor)


class CalibratedWriter(FourBitWriter):
    """`FourBitWriter` of a model whose codes are chosen on a text.

    Args:
        ranks: by parameter, of an adapter to begin at, which the text goes through, too.
    """

    def __init__(
        self, job: Unquantized, shards: ShardWriter, base: BaseHash, ranks: Mapping[str, int],
        on_progress: Progress | None = None,
    ) -> None:  # fmt: skip
        super().__init__(job, shards, base, on_progress)
        self._ranks = ranks
        self.starts: dict[str, tuple[Tensor, Tensor]] = {}
        self.layers: list[LayerError] = []

    def write(self, model: LentModel, ids: Tensor, counts: Tensor, waiting: int, dtype: torch.dtype) -> None:
        """Run the text (`run_side_by_side`; `waiting` tokens of it may wait; products in `dtype`), and write."""
        targets = {f"{name}.weight" for name in self._job.targets}
        self.write_others()
        run_side_by_side(
            model, ids, counts, self.stored, targets, self._round, chunk_tokens=CHUNK_TOKENS, waiting_tokens=waiting,
            capped=True, dtype=dtype,
        )  # fmt: skip
        for name in targets - set(self.done):  # no text passed them
            self.add(name, self.nearest(name, self.target(name)))

    def _round(self, name: str, moments: Moments) -> Multiply:
        target, rank = self.target(name), self._ranks.get(name, 0)
        wanted, importance = moments.wanted(target), moments.own.diagonal()
        plain = self.nearest(name, wanted, importance)
        weight = round_with_feedback(wanted, moments, plain, SWEEPS, refit=True)
        if rank:  # once more, of what the start leaves to do
            a, b = start_of(wanted, weight.dequantize(torch.float32), moments, rank)
            rest = wanted - b @ a
            weight = round_with_feedback(rest, moments, self.nearest(name, rest, importance), SWEEPS, refit=True)
        decoded = weight.dequantize(torch.float32)
        some = slice(None, None, max(len(target) // MEASURED_ROWS, 1))
        size, before = moments.error(target[some]), plain.dequantize(torch.float32)[some] - target[some]
        wrong = target.sub(decoded)
        self.layers.append(LayerError(
            name=name, weights=float(wrong.norm() / target.norm()) ** 2,
            outputs=moments.error(wrong[some]) / size, nearest=moments.error(before) / size,
        ))  # fmt: skip
        self.add(name, weight)
        if not rank:
            return partial(_multiply, weight)
        a, b = self.starts[name] = start_of(wanted, decoded, moments, rank)
        return partial(_multiply_with_start, weight, a, b)


def _multiply_with_start(weight: QuantizedWeight, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    low = torch.nn.functional.linear(x, a.to(x.dtype))
    return _multiply(weight, x).add_(torch.nn.functional.linear(low, b.to(x.dtype)))


def _multiply(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """(..., in) -> (..., out), in the dtype of `x`."""
    y: Tensor = torch.ops.halfbyte.linear_4bit(
        x, weight.codes, weight.absmax, weight.nested_absmax, weight.nested_offset, weight.quant_type,
        weight.blocksize, weight.shape[0], None,
    )  # fmt: skip
    return y
