"""Weights out of a .gguf file under transformers' names and orientation, decoded tensor by tensor."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from halfbyte.errors import ModelError
from halfbyte.kernels.buffers import trim_heap

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""What can be read. llama.cpp permutes the rows of q and k for "llama" alone; other families change more."""


READ_ELEMENTS = 2**21


class GgufFile:
    """The tensors of one .gguf file.

    All tensors are given in one dtype, the embedding's: float32 and float16 as they are, bfloat16 (what such models
    were released in) where it is quantized. llama.cpp stores norms in F32 whatever they were.
    """

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        import gguf

        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader raises ValueError, IndexError, UnicodeError ... on a bad file
            raise ModelError("is not a readable GGUF file", where=str(path), why=str(error)) from error
        architecture = str(reader.fields["general.architecture"].contents())
        if architecture not in ARCHITECTURES:
            raise ModelError(
                f"holds a {architecture!r} model", where=str(path),
                why=f"GGUF input is built for {', '.join(ARCHITECTURES)}", fix="Use the model's safetensors folder",
            )  # fmt: skip
        by_gguf_name = {tensor.name: tensor for tensor in reader.tensors}
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        name_map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self._path, self._mapping = path, cast(mmap.mmap, reader.data._mmap)  # numpy has no other name for it
        self._heads = permuted_heads(architecture, config)
        kind = by_gguf_name["token_embd.weight"].tensor_type.name if "token_embd.weight" in by_gguf_name else ""
        self._dtype = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
        self._tensors = {}
        for name in parameter_names(config):
            stem, _, suffix = name.rpartition(".")
            gguf_stem = name_map.get_name(stem)
            if gguf_stem is not None and f"{gguf_stem}.{suffix}" in by_gguf_name:
                self._tensors[name] = by_gguf_name.pop(f"{gguf_stem}.{suffix}")
        unread = [name for name in by_gguf_name if not name.startswith("rope_")]
        if unread:
            raise ModelError(f"{len(unread)} tensors have no place in the model, first {unread[0]!r}", where=str(path))
        del reader  # an object for each word of the vocabulary: 60 MB of 49,152
        trim_heap()

    def names(self) -> list[str]:
        """Every tensor's name, as transformers calls it."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which tensor `name` is given."""
        return self._dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, decoded in parts: all of it in float32 would be twice its size beside it."""
        shape = self.shape(name)
        found, at = torch.empty(shape, dtype=self.dtype(name)), 0
        for part in self.slices(name, max(READ_ELEMENTS // max(prod(shape[1:]), 1), 1)):
            found[at : at + len(part)] = part
            at += len(part)
        return found

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of tensor `name`."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        rows: np.ndarray = tensor.data
        order = self._row_order(name)
        rows = rows[start:stop] if order is None else rows[order[start:stop]]
        found = torch.from_numpy(np.array(dequantize(rows, tensor.tensor_type))).to(self.dtype(name))
        if hasattr(mmap, "MADV_DONTNEED"):  # what was read of the file would count as ours until all of it is
            self._mapping.madvise(mmap.MADV_DONTNEED)
        return found

    def slices(self, name: str, rows: int) -> Iterator[Tensor]:
        """Tensor `name`, `rows` rows at a time."""
        count = self.shape(name)[0]
        for start in range(0, count, rows):
            yield self.read_rows(name, start, min(start + rows, count))

    def _row_order(self, name: str) -> np.ndarray | None:
        return row_order(name, self.shape(name)[0], self._heads)


def row_order(name: str, rows: int, heads: tuple[int, int] | None) -> np.ndarray | None:
    """Which stored row each row of `name` is: llama.cpp interleaves the two halves of every q and k head.

    Args:
        heads: query and key heads; None for an architecture that is stored as it is.
    """
    which = {"q_proj": 0, "k_proj": 1}.get(name.split(".")[-2])
    if heads is None or which is None:
        return None
    return np.arange(rows).reshape(heads[which], -1, 2).swapaxes(1, 2).reshape(-1)


def permuted_heads(architecture: str, config: PretrainedConfig) -> tuple[int, int] | None:
    """`heads` of `row_order` for a GGUF architecture."""
    return (config.num_attention_heads, config.num_key_value_heads) if architecture == "llama" else None


def parameter_names(config: PretrainedConfig) -> list[str]:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    return [name for name, _ in model.named_parameters()]
