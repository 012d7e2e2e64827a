"""Where a base model comes from: a safetensors folder, a .gguf file, or a hub id; one reading interface for all."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from halfbyte.checkpoint.adapter import Adapter
from halfbyte.checkpoint.rows import has_rows
from halfbyte.checkpoint.shards import PICKLE_SUFFIXES, SafetensorsFolder
from halfbyte.config import QuantConfig
from halfbyte.config.gguf_header import read_gguf_header
from halfbyte.config.model_config import check_links, check_sizes, read_model_config
from halfbyte.errors import ModelError, ResourceError
from halfbyte.model.gguf_source import GgufFile
from halfbyte.quant import QuantizedWeight

logger = logging.getLogger("halfbyte")

METHOD = "halfbyte"
"""`quant_method` of a folder that bitsandbytes cannot read."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


class TensorReader(Protocol):
    """Reads tensors whole, or in slices of some rows, of which the next overwrites the last; names are the file's."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...
    def slices(self, name: str, rows: int) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Source:
    """A base model that has been found but not loaded.

    Attributes:
        label: what the user called it.
        path: the local folder or .gguf file.
        config: transformers' config, without quantization fields.
        stored_quantization: the config's own quantization fields: bitsandbytes 4-bit or ours, or None.
    """

    label: str
    path: Path
    config: PretrainedConfig
    stored_quantization: dict[str, Any] | None

    @property
    def is_gguf(self) -> bool:
        """Whether the weights come from a .gguf file."""
        return self.path.is_file()

    def open_tensors(self, *, mapped: bool = False) -> TensorReader:
        """The weights' reader.

        Args:
            mapped: give tensors of safetensors files as views of the file, shared with every process that maps it.
        """
        return GgufFile(self.path, self.config) if self.is_gguf else SafetensorsFolder(self.path, mapped=mapped)


def open_source(path: str) -> Source:
    """Find the base model called `path` and read its config.

    Raises:
        ModelError: nothing there, not a model, pickled weights, a quantization that is not bitsandbytes' 4 bit.
        ResourceError: a hub id that cannot be fetched.
    """
    local = locate(path)
    folder, kwargs = (local.parent, {"gguf_file": local.name}) if local.is_file() else (local, {})
    if not kwargs and not (folder / "config.json").is_file():
        raise ModelError("no config.json", where=path, fix="Give a model folder, a .gguf file or a hub id")
    has_code = not kwargs and "auto_map" in read_model_config(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **kwargs)
    except Exception as error:  # transformers raises KeyError, ValueError, OSError and more for a bad config
        if has_code:
            raise ModelError(
                "needs code from its own folder (auto_map), which is not run", where=path,
                fix="Give a model of an architecture that transformers has",
            ) from error  # fmt: skip
        raise ModelError("the config cannot be read", where=path, why=first_line(error)) from error
    if has_code:
        logger.warning("%s: config.json names code in the folder (auto_map), which is not run", path)
    check_sizes(config.to_dict(), path)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        del config.quantization_config
        if not is_four_bit(stored):
            method = stored.get("quant_method", "unknown")
            raise ModelError(
                f"is already quantized by {method}", where=path,
                why="only bitsandbytes' 4-bit format and halfbyte's own are read", fix="Give the 16-bit model",
            )  # fmt: skip
    return Source(label=path, path=local, config=config, stored_quantization=stored)


def check_weights(path: str) -> None:
    """See that the model called `path` has readable weights, from their headers alone (a second or less).

    Raises:
        ModelError: as `open_source`; pickled weights above all, before anything else of the folder is complained of.
        ResourceError: a hub id that cannot be fetched.
    """
    local = locate(path)
    if local.is_dir():
        SafetensorsFolder(local)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with its chat template, of the base model called `path`.

    Raises:
        ModelError: no usable tokenizer there, or no config to go with it.
    """
    local = locate(path)
    folder, kwargs = (local.parent, {"gguf_file": local.name}) if local.is_file() else (local, {})
    if not kwargs:
        open_source(path)  # transformers reads the config for it, and does not say so well what is wrong there
    return _tokenizer(folder, path, **kwargs)


def _tokenizer(folder: Path, where: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **kwargs)
    except Exception as error:  # as above
        raise ModelError(
            "no usable tokenizer", where=where, why=first_line(error),
            fix="Put the model's tokenizer.json and tokenizer_config.json beside its config.json",
        ) from error  # fmt: skip


def adapter_tokenizer(path: str, adapter: Adapter | None) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model called `path`, or the one that `adapter` has beside it because it added tokens.

    Raises:
        ModelError: as `load_tokenizer`.
    """
    if adapter is None or not has_rows(adapter.config) or not (adapter.folder / "tokenizer_config.json").is_file():
        return load_tokenizer(path)
    return _tokenizer(adapter.folder, str(adapter.folder))


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash over vocabulary, merges, special tokens and chat template: what decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((text + "\0" + str(tokenizer.chat_template)).encode()).hexdigest()


def locate(path: str) -> Path:
    """The local folder or .gguf file of `path`, fetched from the hub if it is a hub id and not a local path.

    Raises:
        ModelError: nothing there, pickled weights, a link out of the folder, a .gguf file whose header no reader
            should see.
        ResourceError: a hub id that cannot be fetched.
    """
    local = Path(path).expanduser()
    if path and local.is_dir():
        check_links(local)
        return local
    if local.is_file():
        if local.suffix == ".gguf":
            read_gguf_header(local)
            return local
        if local.suffix in PICKLE_SUFFIXES:
            raise ModelError("pickled weights are refused", where=path, fix="Convert them to safetensors")
        raise ModelError("is a file", where=path, fix="Give the model's folder, a .gguf file or a hub id")
    if not HUB_ID.fullmatch(path) or path.startswith("."):
        raise ModelError("no such model", where=path or "model.path", fix="Give a folder, a .gguf file or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=HUB_FILES))
    except Exception as error:  # no network, no such repository, no permission, a full disk: each its own type
        raise ResourceError(
            "neither a local path nor to be fetched from the Hugging Face hub", where=path, why=first_line(error)
        ) from error


def is_four_bit(stored: dict[str, Any]) -> bool:
    """Whether a quantization_config is of bitsandbytes' 4-bit format or of our own."""
    return bool(stored.get("load_in_4bit") or stored.get("_load_in_4bit") or stored.get("quant_method") == METHOD)


def stored_quant_settings(stored: dict[str, Any]) -> dict[str, Any]:
    """A folder's quantization_config as `quant` settings (for comparing and recording)."""
    if stored.get("quant_method") == METHOD:
        return {"quant_type": str(stored.get("quant_type")), "double_quant": bool(stored.get("double_quant"))}
    return {
        "quant_type": str(stored.get("bnb_4bit_quant_type", "fp4")),
        "double_quant": bool(stored.get("bnb_4bit_use_double_quant", False)),
    }


def recipe_of(source: Source, quant: QuantConfig, weight: QuantizedWeight) -> dict[str, Any]:
    """What the bytes of `source`'s 4-bit weights depend on, as it is recorded; `weight` is one of them.

    Args:
        quant: what applies where `source` is not quantized.
    """
    if source.stored_quantization is None:
        return quant.recipe
    scale = {} if weight.scale == "absmax" else {"scale": weight.scale}
    return {**stored_quant_settings(source.stored_quantization), "blocksize": weight.blocksize, **scale}


def first_line(error: BaseException) -> str:
    """The first line of what `error` says; the second too where the first only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return json.dumps(text[:300], ensure_ascii=False).strip('"')
