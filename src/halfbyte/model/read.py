"""A tensor out of a model's files, checked; a weight quantized on the way, slice by slice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.config import QuantConfig
from halfbyte.config.formats import STATE_KEYS
from halfbyte.errors import ModelError
from halfbyte.kernels import count_nonfinite
from halfbyte.model.source import TensorReader
from halfbyte.quant import QuantizedWeight, quantize_slices, slice_rows
from halfbyte.quant.weight import SOURCE_DTYPES

SLICE_ELEMENTS = 2 * 2**20
"""Elements of a large weight that are in memory unquantized at a time: 4 MB in 16 bits, which a cache still holds."""


def read_quantized(
    reader: TensorReader, name: str, module: nn.Module, quant: QuantConfig, path: str
) -> QuantizedWeight:
    """Tensor `name` in 4 bits, in the orientation of nn.Linear: read slice by slice, or taken as it is stored.

    Raises:
        ModelError: wrong shape or dtype, NaN or Inf; names `path` and the tensor.
    """
    where = f"{path}: {name}"
    state = {n.removeprefix(name + "."): reader.read(n) for n in state_names(reader, name)}
    if state:
        return QuantizedWeight.from_bnb_tensors(reader.read(name), state, name=where)
    slices, shape = weight_slices(reader, name, module, quant, path)
    return quantize_slices(slices, shape, reader.dtype(name), quant, name=where)


def weight_slices(
    reader: TensorReader, name: str, module: nn.Module, quant: QuantConfig, path: str
) -> tuple[Iterable[Tensor], tuple[int, ...]]:
    """Tensor `name` in slices for `quantize_slices`, in the orientation of nn.Linear, and its shape in that.

    Raises:
        ModelError: wrong shape; names `path` and the tensor.
    """
    shape = reader.shape(name)
    check_shape(shape, weight_of(module), f"{path}: {name}")
    if isinstance(module, Conv1D):  # stored as (in, out)
        return [reader.read(name).T.contiguous()], shape[::-1]
    return reader.slices(name, slice_rows(shape, quant.blocksize, SLICE_ELEMENTS)), shape


def state_names(reader: TensorReader, name: str) -> list[str]:
    """What is stored beside tensor `name`; empty when that is not in 4 bits."""
    suffixes = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *STATE_KEYS)
    available = getattr(reader, "tensors", {})
    return [f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" in available]


def read_unquantized(reader: TensorReader, name: str, expected: Tensor, path: str) -> Tensor:
    """Tensor `name` as it is stored.

    Raises:
        ModelError: another shape than `expected`, an unsupported dtype, NaN or Inf; names `path` and the tensor.
    """
    where = _check_unquantized(reader, name, expected, path)
    (tensor,) = _finite([reader.read(name)], where)
    return tensor


def unquantized_slices(reader: TensorReader, name: str, expected: Tensor, path: str) -> Iterator[Tensor]:
    """`read_unquantized` in slices, for a caller that is done with each before the next is read."""
    where = _check_unquantized(reader, name, expected, path)
    shape = reader.shape(name)
    return _finite(reader.slices(name, slice_rows(shape, 1, SLICE_ELEMENTS)) if shape else [reader.read(name)], where)


def _check_unquantized(reader: TensorReader, name: str, expected: Tensor, path: str) -> str:
    where, dtype = f"{path}: {name}", reader.dtype(name)
    check_shape(reader.shape(name), expected, where)
    if dtype not in SOURCE_DTYPES:
        raise ModelError(f"has dtype {dtype}", where=where, why="float32, bfloat16 and float16 are supported")
    return where


def _finite(slices: Iterable[Tensor], where: str) -> Iterator[Tensor]:
    bad = 0
    for part in slices:
        bad += count_nonfinite(part)
        yield part
    if bad:
        raise ModelError(f"has {bad} NaN or Inf", where=where, fix="Use a checkpoint whose weights are finite")


def weight_of(module: nn.Module) -> nn.Parameter:
    """The parameter `weight` of `module`."""
    return cast(nn.Parameter, module.weight)


def check_shape(shape: tuple[int, ...], expected: Tensor, where: str) -> None:
    """ModelError at `where` unless `shape` is that of `expected`."""
    if tuple(shape) != tuple(expected.shape):
        raise ModelError(f"has shape {tuple(shape)}, the config says {tuple(expected.shape)}", where=where)
