"""A model folder in, a bitsandbytes 4-bit folder out; memory holds a slice of one tensor and its scales."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.checkpoint import write_folder
from halfbyte.checkpoint.shard_writer import Pieces, write_shards
from halfbyte.config import QuantConfig
from halfbyte.config.formats import bits_of
from halfbyte.config.target import check_new
from halfbyte.errors import ConfigError
from halfbyte.model.experts import expert_layers
from halfbyte.model.hf_config import HalfbyteConfig
from halfbyte.model.load import Progress, skeleton
from halfbyte.model.memory import peak_memory
from halfbyte.model.mix import mixed_formats
from halfbyte.model.names import file_name, match_names
from halfbyte.model.read import unquantized_slices, weight_slices
from halfbyte.model.source import Source, TensorReader, load_tokenizer, open_source
from halfbyte.model.targets import linear_names, modules_to_quantize
from halfbyte.quant import SliceQuantizer
from halfbyte.quant.blocks import num_code_bytes

COPIED_FILES = ("generation_config.json",)


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """Sizes in bytes; `bits_per_weight` is of the quantized layers, scales included."""

    bytes_in: int
    bytes_out: int
    bits_per_weight: float
    quantized: int
    """Layers that are."""
    formats: dict[str, str] = field(default_factory=dict)
    """Of each layer, where a budget of bits is spread."""
    peak_memory: int
    seconds: float
    output: str

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


@dataclass(frozen=True)
class Unquantized:
    """A model in 16 bits that is to be written in 4: what is known before any tensor is read.

    Attributes:
        names: the stored name of every parameter.
        targets: the linear layers that are quantized.
        sizes: bytes of every stored tensor.
        formats: of the targets that are not in `quant.quant_type`, and perhaps of others.
    """

    source: Source
    reader: TensorReader
    model: PreTrainedModel
    names: dict[str, str]
    targets: list[str]
    sizes: dict[str, int]
    quant: QuantConfig
    formats: Mapping[str, str] = field(default_factory=dict)

    def quant_of(self, layer: str) -> QuantConfig:
        """How one of `targets` is quantized."""
        return replace(self.quant, quant_type=self.formats.get(layer, self.quant.quant_type))  # type: ignore[arg-type]

    def file_name(self, name: str) -> str:
        """What the files that are written call parameter `name`."""
        return file_name(self.model, name, self.names[name])

    @property
    def header_bytes(self) -> int:
        """Room for a shard's header: a 4-bit weight is up to seven tensors."""
        return sum(7 * (len(name) + 200) for name in self.names)

    def finish(self, folder: Path) -> None:
        """Write config, tokenizer and what else makes a model of the tensors in `folder`."""
        _write_config(self, folder)
        load_tokenizer(self.source.label).save_pretrained(folder)
        for file in COPIED_FILES:
            if self.source.path.is_dir() and (self.source.path / file).is_file():
                shutil.copyfile(self.source.path / file, folder / file)


def open_unquantized(path: str, output: str | Path, quant: QuantConfig) -> Unquantized:
    """The model called `path`, checked as far as that needs no weights; with `quant.bits` they are read once.

    Raises:
        ModelError: the model cannot be read.
        ConfigError: it is already quantized, or `output` is there already, or has no folder to lie in.
    """
    check_new(Path(output))
    source = open_source(path)
    _check_wish(source, quant)
    reader, model = source.open_tensors(), skeleton(source)
    names = match_names(model, reader, path)
    targets = modules_to_quantize(model, quant.skip_modules)
    sizes = {name: prod(reader.shape(name)) * reader.dtype(name).itemsize for name in names.values()}
    formats = mixed_formats(reader, model, names, targets, quant, path) if quant.bits else {}
    return Unquantized(source, reader, model, names, targets, sizes, quant, formats)


def quantize_model(
    path: str, output: str | Path, quant: QuantConfig, *, on_progress: Progress | None = None
) -> QuantizeResult:
    """Write the model called `path` as a folder that transformers + bitsandbytes and halfbyte load.

    Raises:
        ModelError: the model cannot be read, or has NaN or Inf.
        ConfigError: it is already quantized, or `output` is there already, or has no folder to lie in.
        ResourceError: the disk is full or not writable; nothing is left under the final name.
    """
    started = time.perf_counter()
    job = open_unquantized(path, output, quant)
    reader, model, names = job.reader, job.model, job.names
    counts = {"weights": 0, "bytes": 0}

    def tensors() -> Iterator[tuple[str, Tensor | Pieces]]:
        for done, (name, stored_name) in enumerate(names.items()):
            if on_progress:
                on_progress(done, len(names), name)
            module_name, _, leaf = name.rpartition(".")
            if module_name not in job.targets or leaf != "weight":
                slices = unquantized_slices(reader, stored_name, model.get_parameter(name), path)
                yield job.file_name(name), Pieces(reader.dtype(stored_name), reader.shape(stored_name), slices)
                continue
            module = model.get_submodule(module_name)
            parts, shape = weight_slices(reader, stored_name, module, quant, path)
            kind = job.quant_of(module_name)
            where = f"{path}: {stored_name}"
            quantizer = SliceQuantizer(parts, shape, reader.dtype(stored_name), kind, name=where)
            written = torch.empty(
                num_code_bytes(prod(shape), bits_of(kind.quant_type)), dtype=torch.uint8, device="meta"
            )
            written_name = job.file_name(name)
            yield written_name, Pieces(torch.uint8, (written.numel(), 1), quantizer.codes())
            weight = quantizer.finish(written)
            counts["weights"] += prod(weight.shape)
            counts["bytes"] += weight.nbytes
            for key, tensor in weight.bnb_tensors().items():
                yield f"{written_name}.{key}", tensor

    with write_folder(output, expected_bytes=sum(job.sizes.values()) // 3) as writer:
        _, bytes_out = write_shards(writer.path, tensors(), header_bytes=job.header_bytes)
        job.finish(writer.path)
    if on_progress:
        on_progress(len(names), len(names), "")
    return QuantizeResult(
        bytes_in=sum(job.sizes.values()), bytes_out=bytes_out, quantized=len(job.targets), formats=dict(job.formats),
        bits_per_weight=8 * counts["bytes"] / max(counts["weights"], 1), peak_memory=peak_memory(),
        seconds=time.perf_counter() - started, output=str(output),
    )  # fmt: skip


def scale_text(quant: QuantConfig) -> str:
    """`quant.chosen_scale` and why, for people."""
    why = "of least squared error and either sign"
    if not quant.bits and quant.quant_type in ("nf4", "fp4"):
        why += "; absmax gives bitsandbytes' own bytes"
    if quant.scale != "auto":
        why = "as set"
    elif quant.calibrate:
        why = "calibrated"
    elif quant.chosen_scale == "absmax":
        why = "eight bits leave little to gain"
    return f"scales: {quant.chosen_scale} ({why})"


def _check_wish(source: Source, quant: QuantConfig) -> None:
    if source.stored_quantization is not None:
        raise ConfigError("is already quantized", where=source.label, fix="Give the 16-bit model")
    if quant.embeddings != "as_stored":
        raise ConfigError(
            f"{quant.embeddings!r} is not written", where="quant.embeddings",
            why="the folder keeps embeddings and head as they are stored, for every reader of it",
            fix="Set it where the model is loaded: train, eval, generate, chat, plan",
        )  # fmt: skip


def _write_config(job: Unquantized, folder: Path) -> None:
    """config.json with bitsandbytes' quantization_config, and the dtype most of the model was in."""
    quant, stored = job.quant, [s for name, s in job.names.items() if name.rpartition(".")[0] in job.targets]
    dtype = max(
        map(job.reader.dtype, stored), key=lambda d: (d == torch.bfloat16, d.itemsize), default=torch.float32
    )  # fmt: skip
    skipped = sorted(set(linear_names(job.model)) - set(job.targets))
    compute = None if quant.compute_dtype == "auto" else quant.compute_dtype
    settings = HalfbyteConfig(
        bnb_4bit_quant_type=quant.quant_type, bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=compute, blocksize=quant.blocksize, llm_int8_skip_modules=skipped, layers=job.formats,
    ).resolve(skip_modules=skipped, model_dtype=dtype, experts=bool(expert_layers(job.model)))  # fmt: skip
    config = job.source.config
    config.dtype = dtype
    config.architectures = [type(job.model).__name__]
    config.quantization_config = settings.to_dict()
    config.save_pretrained(folder)
