"""Which layer of a model gets which format, of a budget of bits (`quant.bits`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.config import QuantConfig
from halfbyte.model.read import read_unquantized, weight_of
from halfbyte.model.source import TensorReader
from halfbyte.quant import quantize_slices
from halfbyte.quant.mix import Unit, formats_for, spread, unit_of

SAMPLED_BLOCKS = 1024
"""Of a weight, at least, that its error is taken of."""


def mixed_formats(
    reader: TensorReader, model: PreTrainedModel, names: Mapping[str, str], layers: Sequence[str], quant: QuantConfig,
    path: str,
) -> dict[str, str]:  # fmt: skip
    """The format of each of `layers`, chosen by its error in each, all layers alike. Raises as `unit_errors`."""
    return spread(*unit_errors(reader, model, names, layers, quant, path), quant)


def unit_errors(
    reader: TensorReader, model: PreTrainedModel, names: Mapping[str, str], layers: Sequence[str], quant: QuantConfig,
    path: str,
) -> tuple[list[Unit], tuple[str, ...]]:  # fmt: skip
    """`layers` as units, each with the relative squared error of its weights in each of the formats that `quant.bits`
    leaves to choose from, which come beside; one weight in memory at a time.

    Raises:
        ConfigError: `quant.bits` is less than the narrowest format takes.
        ModelError: as `read_unquantized`.
    """
    shapes = {layer: tuple(weight_of(model.get_submodule(layer)).shape) for layer in layers}
    formats, units = formats_for(list(shapes.values()), quant), dict[str, Unit]()
    for layer in layers:
        name = f"{layer}.weight"
        weight = read_unquantized(reader, names[name], model.get_parameter(name), path)
        if isinstance(model.get_submodule(layer), Conv1D):
            weight = weight.T.contiguous()
        before = units.get(unit_of(layer), Unit((), (), (0.0,) * len(formats)))
        errors = tuple(e + _error(weight, quant, kind) for e, kind in zip(before.errors, formats, strict=True))
        units[unit_of(layer)] = Unit((*before.layers, layer), (*before.shapes, shapes[layer]), errors)
    return list(units.values()), formats


def _error(weight: Tensor, quant: QuantConfig, quant_type: str) -> float:
    """Of some of the rows: the search for scales takes its time."""
    plain = replace(quant, quant_type=quant_type)  # type: ignore[arg-type]
    rows = weight[:: max(weight.numel() // (SAMPLED_BLOCKS * quant.blocksize), 1)].contiguous()
    made = quantize_slices([rows], tuple(rows.shape), rows.dtype, plain, name="weight")
    return relative_error(made.dequantize(torch.float32), rows)


def relative_error(decoded: Tensor, weight: Tensor) -> float:
    """The squared error of `decoded`, float32, over the squares of `weight`."""
    wide = weight.float()
    return float((decoded - wide).square().sum() / wide.square().sum().clamp(min=1e-30))
