"""Input embeddings and output head in int8, where quant.embeddings asks for it: quantized while they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.config import QuantConfig
from halfbyte.errors import ConfigError
from halfbyte.model.base_hash import BaseHash
from halfbyte.model.read import unquantized_slices, weight_of
from halfbyte.model.source import TensorReader
from halfbyte.nn import FrozenLinear
from halfbyte.nn.int8_embedding import Int8Embedding
from halfbyte.quant.blocks import INT8_BLOCK, num_blocks
from halfbyte.quant.int8 import TINY, quantize_int8
from halfbyte.quant.memory import lasting

AT_ONCE = 128 * 1024
"""Weights that are quantized at a time: what that makes stays in L2. 2**21 would take six times as long."""


@dataclass(frozen=True)
class Int8Weight:
    """A matrix as `quantize_int8` gives it, and the dtype that it is stored in."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype


def int8_names(model: PreTrainedModel, quant: QuantConfig) -> set[str]:
    """The weights that `quant` wants in int8: of the input embedding and of the output head, be they one or two.

    Raises:
        ConfigError: the model has no such modules, or they are not what we know to replace.
    """
    if quant.embeddings != "int8":
        return set()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        raise ConfigError(
            "'int8' is not possible for this architecture", where="quant.embeddings",
            why=f"it has a {type(embedding).__name__} as embeddings and a {type(head).__name__} as output head",
            fix="Leave quant.embeddings at as_stored",
        )  # fmt: skip
    return {f"{name}.weight" for name, module in model.named_modules() if module is embedding or module is head}


def read_int8(
    model: nn.Module, name: str, reader: TensorReader, stored_name: str, path: str, base: BaseHash,
    least: int = 0,
) -> Int8Weight:  # fmt: skip
    """Parameter `name` of `model` from tensor `stored_name`, quantized slice by slice; `base` hashes what is stored.

    Args:
        least: rows it has at least; those beyond the tensor's are zeros.

    Raises:
        ModelError: as `read_unquantized`.
    """
    expected = model.get_parameter(name)
    rows, cols = max(expected.shape[0], least), expected.shape[1]
    codes, done = lasting(rows * cols).view(torch.int8).view(rows, cols), 0
    scales = torch.full((rows, num_blocks(cols, INT8_BLOCK)), TINY)
    for part in base.through(name, unquantized_slices(reader, stored_name, expected, path)):
        for few in part.split(max(AT_ONCE // cols, 1)):
            to = slice(done, done + few.shape[0])
            codes[to], scales[to] = quantize_int8(few)
            done += few.shape[0]
    model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(codes, requires_grad=False)
    return Int8Weight(codes, scales, reader.dtype(stored_name))


def use_int8(model: PreTrainedModel, weights: Sequence[Int8Weight], compute_dtype: torch.dtype) -> None:
    """Have embedding and head, which hold the codes of `weights` already, decode them."""
    held = {weight.codes.data_ptr(): weight for weight in weights}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = held.get(_pointer(embedding))
    if weight is not None:
        parameter = weight_of(embedding)
        embedding = cast(nn.Embedding, embedding)
        model.set_input_embeddings(Int8Embedding(parameter, weight.scales, embedding, weight.dtype, compute_dtype))
    weight = held.get(_pointer(head))
    if weight is not None:
        assert isinstance(head, nn.Linear)
        model.set_output_embeddings(FrozenLinear(weight_of(head), head.bias, weight.scales))


def _pointer(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.data_ptr() if isinstance(weight, Tensor) else 0
