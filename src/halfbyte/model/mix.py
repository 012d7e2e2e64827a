"""Which layer of a model gets which format, of a budget of bits (`quant.bits`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.config import QuantConfig
from halfbyte.model.read import read_unquantized, weight_of
from halfbyte.model.source import TensorReader
from halfbyte.quant import quantize_slices
from halfbyte.quant.mix import Unit, formats_for, spread, unit_of


def mixed_formats(
    reader: TensorReader, model: PreTrainedModel, names: Mapping[str, str], layers: Sequence[str], quant: QuantConfig,
    path: str,
) -> dict[str, str]:  # fmt: skip
    """The format of each of `layers`, chosen by its error in each; one weight in memory at a time.

    What a layer costs a model's loss grows with its relative squared error (arXiv 2411.17525), by a factor that is not
    known without many evaluations: all layers count alike.

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
    return spread(list(units.values()), formats, quant)


def _error(weight: Tensor, quant: QuantConfig, quant_type: str) -> float:
    plain = replace(quant, quant_type=quant_type)  # type: ignore[arg-type]
    made = quantize_slices([weight], tuple(weight.shape), weight.dtype, plain, name="weight")
    wide = weight.float()
    wrong = made.dequantize(wide.dtype) - wide
    return float(wrong.square().sum() / wide.square().sum().clamp(min=1e-30))
