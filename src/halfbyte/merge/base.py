"""The base of a merge, tensor by tensor: the exact values that the adapter was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.config import QuantConfig
from halfbyte.model.base_hash import BaseHash
from halfbyte.model.load import Progress, skeleton
from halfbyte.model.names import file_name, match_names
from halfbyte.model.read import read_quantized, read_unquantized, state_names, weight_slices
from halfbyte.model.source import Source, TensorReader, open_source, recipe_of
from halfbyte.model.targets import modules_to_quantize
from halfbyte.quant import QuantizedWeight


@dataclass(frozen=True)
class MergeBase:
    """A base model of which one tensor is in memory at a time.

    Attributes:
        model: its skeleton: shapes, no values.
        names: the stored name of every parameter.
        targets: parameters that training holds in 4 bits.
        quant: how they are quantized where they are not stored in 4 bits.
        stored_rows: of embedding and head, where the model has more.
        remembered: how many of the 4-bit weights read last are kept, for those who read them several times.
    """

    source: Source
    reader: TensorReader
    model: PreTrainedModel
    names: dict[str, str]
    targets: frozenset[str]
    quant: QuantConfig
    stored_rows: int | None = None
    remembered: int = 0
    _recent: dict[str, QuantizedWeight] = field(default_factory=dict, repr=False)

    @property
    def in_4_bits(self) -> bool:
        """Whether the files hold the 4-bit weights themselves."""
        return self.source.stored_quantization is not None

    def quantized(self, name: str) -> QuantizedWeight:
        """Parameter `name`, one of `targets`, in 4 bits and in the orientation of nn.Linear."""
        weight = self._recent.get(name)
        if weight is None:
            module = self.model.get_submodule(name.rpartition(".")[0])
            weight = read_quantized(self.reader, self.names[name], module, self.quant, self.source.label)
            if self.remembered:
                self._recent[name] = weight
            if len(self._recent) > self.remembered:
                del self._recent[next(iter(self._recent))]
        return weight

    def format_of(self, name: str) -> str:
        """The format of parameter `name`, one of `targets`, as it is stored, or as the whole is quantized."""
        states = state_names(self.reader, self.names[name])
        return states[-1].rpartition("__")[2] if states else self.quant.quant_type

    def original_slices(self, name: str) -> Iterable[Tensor]:
        """Parameter `name`, one of `targets`, as it was before quantization, in the orientation of nn.Linear; each
        slice is overwritten by the next.
        """
        module = self.model.get_submodule(name.rpartition(".")[0])
        return weight_slices(self.reader, self.names[name], module, self.quant, self.source.label)[0]

    def unquantized(self, name: str) -> Tensor:
        """Parameter `name`, none of `targets`, as it is stored."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        expected = self.model.get_parameter(name)
        if module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            expected = cast(torch.nn.Parameter, expected[: self.stored_rows])
        return read_unquantized(self.reader, self.names[name], expected, self.source.label)

    def file_name(self, name: str) -> str:
        """What files that are written call parameter `name`."""
        return file_name(self.model, name, self.names[name])

    def is_transposed(self, name: str) -> bool:
        """Whether files hold `name` as (in, out)."""
        return isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D)

    def dtype(self) -> torch.dtype:
        """The 16-bit dtype of a merged model: the base's own; bfloat16, which has its range, for a base in float32."""
        name = next((n for n in self.names if n in self.targets), next(iter(self.names)))
        dtype = self.quantized(name).dtype if self.in_4_bits else self.reader.dtype(self.names[name])
        return torch.bfloat16 if dtype == torch.float32 else dtype

    def sha256(self, on_progress: Progress | None = None) -> str:
        """The hash that `load_model` gives the same base; reads every tensor once."""
        with BaseHash() as base:
            for done, name in enumerate(self.names):
                if on_progress:
                    on_progress(done, len(self.names), name)
                if name in self.targets:
                    weight = self.quantized(name)
                    base.add(name, weight.codes, weight.absmax, weight.nested_absmax)
                else:
                    base.add(name, self.unquantized(name))
        return base.hexdigest()

    def recipe(self) -> dict[str, Any]:
        """{"quant_type": ..., "blocksize": ..., "double_quant": ...} of the 4-bit weights, "scale" if not absmax."""
        if not self.in_4_bits or not self.targets:
            return self.quant.recipe
        name = min(self.targets, key=lambda name: (self.format_of(name) == "int8", name))  # its scales show little
        return recipe_of(self.source, self.quant, self.quantized(name))


def open_base(path: str, quant: QuantConfig) -> MergeBase:
    """The base called `path`; `quant` as it was trained on, for one that is not stored in 4 bits.

    Raises:
        ModelError: as `open_source`, or files and config do not fit each other.
    """
    source = open_source(path)
    reader, model = source.open_tensors(), skeleton(source)
    names = match_names(model, reader, path)
    if source.stored_quantization is not None:
        targets = {name for name, stored in names.items() if state_names(reader, stored)}
    else:
        targets = {f"{name}.weight" for name in modules_to_quantize(model, quant.skip_modules)}
    return MergeBase(source, reader, model, names, frozenset(targets), quant)
