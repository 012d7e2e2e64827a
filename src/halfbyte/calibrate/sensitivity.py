"""How far a model's predictions move when a part of it alone is quantized, for all parts in one pass.

The text goes through the 16-bit model layer by layer. Each layer computes it once more for each unit there, that unit
quantized; what comes out goes on through the layers that follow, in 16 bits, beside the text itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Final, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from halfbyte.calibrate.memory import measured_within
from halfbyte.config import RunConfig
from halfbyte.data import TokenizedData
from halfbyte.kernels.buffers import steady_memory
from halfbyte.model.lent import LentModel, Weights
from halfbyte.model.load import Progress
from halfbyte.model.mix import relative_error, unit_errors
from halfbyte.model.quantize import Unquantized
from halfbyte.model.read import read_unquantized
from halfbyte.model.side_by_side import KeptWeights, input_of, traced_layers
from halfbyte.quant import quantize_slices
from halfbyte.quant.mix import Unit, spread, unit_of

MEASURED_IN: Final = "nf4"
"""The format of a unit that is alone quantized, with the scales that are fastest found."""
MOST_SAID = 3
"""The most sensitive are named."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Which layer gets which format.

    Attributes:
        sensitivities: by unit (`unit_of`), KL divergence by token with it alone in MEASURED_IN; empty: not measured.
        predicted: bytes at the fullest moment.
    """

    formats: dict[str, str]
    sensitivities: dict[str, float]
    predicted: int


def measured_mix(
    job: Unquantized, model: LentModel, config: RunConfig, data: TokenizedData, say: Callable[[str], None],
    on_progress: Progress | None = None,
) -> Mix:  # fmt: skip
    """`config.quant.bits` spread over the layers of `job` for the least KL divergence of what `model`, the same in 16
    bits, predicts on a little of `data`, taken for the sum of what each unit costs alone.

    Raises:
        ConfigError, ModelError: as `unit_errors` and `divergences`.
        ResourceError: memory.budget has no room for a little text.
    """
    quant = config.quant
    units, formats = unit_errors(job.reader, job.model, job.names, job.targets, quant, job.source.label)
    text, predicted = measured_within(config, job.model, data, len(units))
    found = measure(job, model, text, units, on_progress)
    if len(found) < len(units):
        first = next(unit.layers[0] for unit in units if unit_of(unit.layers[0]) not in found)
        say(f"bits: by the error of the weights, all layers alike: of {len(units)} parts no text passes "
            f"{len(units) - len(found)} row by row, {first} the first")  # fmt: skip
        return Mix(formats=spread(units, formats, quant), sensitivities={}, predicted=predicted)
    moved = {name: part.moved for name, part in found.items()}
    most = ", ".join(f"{name} {moved[name]:.2g}" for name in sorted(moved, key=lambda name: -moved[name])[:MOST_SAID])
    say(f"bits: measured on {int(text[1].sum())} tokens of {quant.calibrate}, each of {len(units)} parts alone in "
        f"{MEASURED_IN}; most sensitive, KL by token: {most}")  # fmt: skip
    return Mix(formats=spread(weighted(units, found), formats, quant), sensitivities=moved, predicted=predicted)


class Measured(NamedTuple):
    """A unit alone in MEASURED_IN: KL divergence by token, and the relative squared errors of its weights, summed."""

    moved: float
    error: float


def measure(
    job: Unquantized, model: LentModel, text: tuple[Tensor, Tensor], units: Sequence[Unit],
    on_progress: Progress | None = None,
) -> dict[str, Measured]:  # fmt: skip
    """`divergences` of `job`'s layers, by the name of the unit (`unit_of`)."""
    errors = dict[str, float]()

    def stored(name: str) -> Tensor:
        return read_unquantized(job.reader, job.names[name], job.model.get_parameter(name), job.source.label)

    def coarse(name: str) -> Tensor:
        weight = stored(name)
        turned = isinstance(job.model.get_submodule(name.rpartition(".")[0]), Conv1D)
        rows = weight.T.contiguous() if turned else weight
        quant = replace(job.quant, quant_type=MEASURED_IN, scale="absmax")
        decoded = quantize_slices([rows], tuple(rows.shape), rows.dtype, quant, name=name).dequantize(torch.float32)
        errors[name] = relative_error(decoded, rows)
        return decoded.T.contiguous() if turned else decoded

    found = dict[str, Measured]()
    for number, moved in divergences(model, *text, stored, units, coarse, on_progress).items():
        layers = units[number].layers
        found[unit_of(layers[0])] = Measured(max(moved, 0.0), sum(errors[f"{layer}.weight"] for layer in layers))
    return found


def weighted(units: Sequence[Unit], found: Mapping[str, Measured]) -> list[Unit]:
    """`units` with the divergence expected in each format in place of the weights' error, for it grows about as this
    does (docs/formats.md: measured)."""
    each = ((unit, found[unit_of(unit.layers[0])]) for unit in units)
    return [
        replace(unit, errors=tuple(part.moved / max(part.error, 1e-30) * error for error in unit.errors))
        for unit, part in each
    ]


@steady_memory()
@torch.no_grad()
def divergences(
    model: LentModel, ids: Tensor, counts: Tensor, weights: Weights, units: Sequence[Unit], coarse: Weights,
    on_progress: Progress | None = None,
) -> dict[int, float]:  # fmt: skip
    """KL(what `model` predicts || what it predicts with the layers of one of `units` `coarse`), nats by token.

    Memory is the text's hidden states once for each unit, in float32, beside one layer's weights and what it computes.

    Args:
        ids: (sequences, tokens) int64, padded at the end.
        counts: the same shape: which tokens are text.
        weights, coarse: of the model as it is, and of layers quantized; by parameter.

    Returns:
        By number of the unit; without those that the text does not pass, row by row in a decoder layer.

    Raises:
        ModelError: the model has no list of decoder layers.
    """
    kept, states = KeptWeights(weights), dict[int, Tensor]()
    with model.lend(kept):
        layers = traced_layers(model, [ids], [f"{name}.weight" for unit in units for name in unit.layers])
        clean = input_of(layers[0].module, partial(model.run, ids))
        for done, layer in enumerate(layers):
            if on_progress:
                on_progress(done, len(layers), "measuring")
            passed = {linear.name for group in layer.groups for linear in group}
            with kept.keep(passed):
                for number in states:
                    states[number] = layer(states[number])
                after = layer(clean)
                for number, unit in enumerate(units):
                    names = [f"{name}.weight" for name in unit.layers]
                    if passed.issuperset(names):
                        with kept.replaced({name: coarse(name) for name in names}):
                            states[number] = layer(clean)
            clean = after
    return _predicted(model, ids, counts, weights, clean, states)


def _predicted(
    model: LentModel, ids: Tensor, counts: Tensor, weights: Weights, clean: Tensor, states: dict[int, Tensor]
) -> dict[int, float]:
    """A sequence at a time, so that few logits are alive."""
    found = dict.fromkeys(states, 0.0)
    with model.lend(cache(weights)):  # embeddings and head alone: read once
        for row in range(len(ids)):
            some, counted = slice(row, row + 1), counts[row]

            def scores(of: Tensor, some: slice = some, counted: Tensor = counted) -> Tensor:
                return model.logits_after(of[some], ids[some])[0, counted].log_softmax(1)

            wanted = scores(clean)
            share = wanted.exp()
            for number, state in states.items():
                found[number] += float(scores(state).sub_(wanted).mul_(share).sum())
    return {number: -total / int(counts.sum()) for number, total in found.items()}
