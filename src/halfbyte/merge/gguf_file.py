"""A merged model, or an adapter alone, as a .gguf file for llama.cpp, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from halfbyte.errors import ConfigError, ModelError
from halfbyte.merge.base import MergeBase
from halfbyte.merge.fold import Fold
from halfbyte.merge.gguf_blocks import blocks_with_feedback
from halfbyte.merge.gguf_tokenizer import USER_DEFINED, tokenizer_fields
from halfbyte.merge.record import GGUF_KEY
from halfbyte.merge.update import Update, Updates
from halfbyte.model.gguf_source import ARCHITECTURES, permuted_heads, row_order
from halfbyte.model.load import Progress
from halfbyte.quant.moments import Moments

TYPES = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Numbers of the matrices. Vectors are F32; embeddings and head in Q8_0 where the others have fewer bits."""


class GgufPlan:
    """What a .gguf file of this base will hold: names, order of rows, types.

    Raises:
        ModelError: an architecture, or a setting of it, that GGUF is not written for.
        ConfigError: an unknown type.
    """

    def __init__(self, base: MergeBase, kind: str) -> None:
        if kind not in TYPES:
            raise ConfigError(f"{kind!r} is not a type", where="--gguf-type", fix=f"Choose {', '.join(TYPES)}")
        config = base.source.config
        check_architecture(config, base.source.label)
        self.kind, self.architecture = kind, str(config.model_type)
        self._heads = permuted_heads(self.architecture, config)
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def name(self, parameter: str) -> str:
        """llama.cpp's name of a parameter."""
        stem, _, leaf = parameter.rpartition(".")
        found = self._names.get_name(stem)
        if found is None:
            raise ModelError("has no place in GGUF", where=parameter)
        return f"{found}.{leaf}"

    def rows(self, parameter: str, values: Tensor) -> Tensor:
        """`values` in the order in which llama.cpp has the rows."""
        order = row_order(parameter, len(values), self._heads)
        if order is None:
            return values
        stored = torch.empty_like(values)
        stored[torch.from_numpy(order)] = values
        return stored

    def rows_back(self, parameter: str, stored: Tensor) -> Tensor:
        """Inverse of `rows`."""
        order = row_order(parameter, len(stored), self._heads)
        return stored if order is None else stored[torch.from_numpy(order)]

    def nbytes(self, parameter: str, shape: tuple[int, ...]) -> int:
        """Bytes of one tensor."""
        block, size = gguf.GGML_QUANT_SIZES[self.type_of(parameter, shape)]
        return prod(shape) // int(block) * int(size)

    def type_of(self, parameter: str, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
        """The numbers of one tensor."""
        kind = self.kind
        if len(shape) < 2:
            kind = "F32"
        elif kind[0] == "Q" and self.name(parameter).partition(".")[0] in ("token_embd", "output"):
            kind = "Q8_0"
        if kind[0] == "Q" and shape[-1] % 32:  # llama.cpp's blocks do not go over the end of a row
            kind = "F16"
        return gguf.GGMLQuantizationType[kind]


class ModelFile:
    """The merged model's file while it is written: fields and places first, then tensors in any order."""

    def __init__(self, fold: Fold, plan: GgufPlan, tokenizer: Any, merged: dict[str, Any], file: Path) -> None:
        self._fold, self._plan, self._file = fold, plan, file
        base = fold.base
        writer = gguf.GGUFWriter(file, plan.architecture)
        add_fields(writer, _copied(base, tokenizer) or _described(base, tokenizer))
        add_fields(writer, [(GGUF_KEY, json.dumps(merged, sort_keys=True))])
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{plan.kind}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        places, end = {}, 0
        for name in base.names:
            shape = tuple(base.model.get_parameter(name).shape)
            kind, size = plan.type_of(name, shape), plan.nbytes(name, shape)
            writer.add_tensor_info(plan.name(name), shape, np.dtype(np.float32), size, raw_dtype=kind)
            places[name] = end
            end = gguf.GGUFWriter.ggml_pad(end + size, writer.data_alignment)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        start = gguf.GGUFWriter.ggml_pad(file.stat().st_size, writer.data_alignment)
        self._places = {name: start + place for name, place in places.items()}
        os.truncate(file, start + end)

    def put(self, name: str, data: NDArray[Any]) -> None:
        """Write a tensor, as GGUF has it."""
        with self._file.open("r+b") as file:
            file.seek(self._places[name])
            np.ascontiguousarray(data).tofile(file)

    def keep(self, name: str) -> None:
        """Write the merged value of a parameter, rounded once."""
        self.nearest(name, self._fold.weight(name).float())

    def nearest(self, name: str, target: Tensor) -> None:
        """Write `target`, every number to its nearest."""
        values = self._plan.rows(name, target)
        self.put(name, quantize(values.numpy(), self._plan.type_of(name, tuple(values.shape))))

    def round(self, name: str, target: Tensor, moments: Moments) -> Callable[[], Tensor]:
        """Write codes chosen by error feedback."""
        kind = self._plan.type_of(name, tuple(target.shape))
        data = blocks_with_feedback(self._plan.rows(name, target), moments, kind.name)
        self.put(name, data)
        return lambda: self._plan.rows_back(name, torch.from_numpy(dequantize(data, kind)))


def write_model(file: ModelFile, names: Collection[str], on_progress: Progress | None = None) -> None:
    """Write every parameter: weights folded in float32 and rounded once, to the nearest number."""
    for done, name in enumerate(names):
        if on_progress:
            on_progress(done, len(names), name)
        file.keep(name)


def write_adapter(updates: Updates, plan: GgufPlan, merged: dict[str, Any], file: Path) -> None:
    """Write the adapter alone, for llama.cpp's --lora on a GGUF of its base."""
    rank = max(len(update.a) for update in updates.values())
    writer = gguf.GGUFWriter(file, plan.architecture)
    fields: dict[str, Any] = {
        "general.type": "adapter", "adapter.type": "lora",
        "adapter.lora.alpha": float(rank),  # llama.cpp multiplies by alpha / rank of each pair
        GGUF_KEY: json.dumps(merged, sort_keys=True),
    }  # fmt: skip
    add_fields(writer, fields.items())
    for name, update in updates.items():
        stem, b = plan.name(name), plan.rows(name, update.b * (len(update.a) / rank))
        writer.add_tensor(f"{stem}.lora_a", update.a.contiguous().numpy())
        writer.add_tensor(f"{stem}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_adapter(plan: GgufPlan, parameters: Iterable[str], file: Path) -> Updates:
    """`write_adapter` back, for the parameters it was written for."""
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    updates = {}
    for name in parameters:
        a, b = (torch.from_numpy(np.array(stored[f"{plan.name(name)}.lora_{which}"])) for which in "ab")
        alpha = max(data.shape[0] for key, data in stored.items() if key.endswith("lora_a"))
        updates[name] = Update(a, plan.rows_back(name, b) * (alpha / len(a)))
    return updates


def check_architecture(config: PretrainedConfig, where: str) -> None:
    """ModelError unless llama.cpp computes with these settings what transformers does, as far as tests have shown."""
    rope = getattr(config, "rope_parameters", None) or {}
    problems = []
    if config.model_type not in ARCHITECTURES:
        problems.append(f"the architecture is {config.model_type!r}, GGUF is written for {', '.join(ARCHITECTURES)}")
    elif rope.get("rope_type", "default") != "default":
        problems.append(f"its rotary embedding is scaled by {rope['rope_type']!r}")
    elif getattr(config, "use_sliding_window", False):
        problems.append("its attention has a sliding window")
    elif getattr(config, "mlp_bias", False):
        problems.append("its feed-forward layers have biases")
    if problems:
        raise ModelError(
            "cannot be written as GGUF", where=where, why=problems[0],
            fix="Merge with --format 16bit and convert the folder with llama.cpp's own script",
        )  # fmt: skip


def add_fields(writer: gguf.GGUFWriter, fields: Iterable[tuple[str, Any]]) -> None:
    """Add fields by the type of their values (whole numbers as uint32)."""
    for key, value in fields:
        add = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32, int: writer.add_uint32,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(key, value)


def _copied(base: MergeBase, tokenizer: Any) -> list[tuple[str, Any]]:
    """The fields of a base that is itself a .gguf file, but those that are of its own numbers; with the tokens that
    `tokenizer` has more."""
    if not base.source.is_gguf:
        return []
    own = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version", GGUF_KEY)
    fields = gguf.GGUFReader(base.source.path).fields
    copied = {key: field.contents() for key, field in fields.items() if not key.startswith(own)}
    rows = int(base.source.config.vocab_size)
    new = range(base.stored_rows or rows, rows)
    texts = [str(tokenizer.convert_ids_to_tokens(number)) for number in new]
    for key, more in (("tokens", texts), ("token_type", [USER_DEFINED] * len(new)), ("scores", [0.0] * len(new))):
        if f"tokenizer.ggml.{key}" in copied:
            copied[f"tokenizer.ggml.{key}"] = [*copied[f"tokenizer.ggml.{key}"], *more]
    if new and f"{base.source.config.model_type}.vocab_size" in copied:
        copied[f"{base.source.config.model_type}.vocab_size"] = rows
    return list(copied.items())


def _described(base: MergeBase, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a base that is a transformers folder."""
    config, arch = base.source.config, str(base.source.config.model_type)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    yield "general.type", "model"
    yield "general.name", Path(base.source.label).name
    yield f"{arch}.block_count", int(config.num_hidden_layers)
    yield f"{arch}.context_length", int(config.max_position_embeddings)
    yield f"{arch}.embedding_length", int(config.hidden_size)
    yield f"{arch}.feed_forward_length", int(config.intermediate_size)
    yield f"{arch}.attention.head_count", int(config.num_attention_heads)
    yield f"{arch}.attention.head_count_kv", int(config.num_key_value_heads)
    yield f"{arch}.attention.key_length", head_dim
    yield f"{arch}.attention.value_length", head_dim
    yield f"{arch}.rope.dimension_count", head_dim
    yield f"{arch}.rope.freq_base", float(config.rope_parameters["rope_theta"])
    yield f"{arch}.attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)
    yield f"{arch}.vocab_size", int(config.vocab_size)
    yield from tokenizer_fields(tokenizer, config, base.source.label)
