"""`halfbyte quantize` with lora.init = "pissa" or "loftq": a base and an adapter of the weights alone, no text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.calibrate.start import principal
from halfbyte.calibrate.start_folder import ranks_of, write_start
from halfbyte.calibrate.write import FourBitWriter
from halfbyte.checkpoint import versions, write_folder
from halfbyte.checkpoint.shard_writer import ShardWriter
from halfbyte.config import LoraConfig, RunConfig
from halfbyte.errors import ConfigError
from halfbyte.model.base_hash import BaseHash
from halfbyte.model.load import Progress
from halfbyte.model.memory import peak_memory
from halfbyte.model.quantize import QuantizeResult, open_unquantized
from halfbyte.model.source import load_tokenizer, tokenizer_sha256
from halfbyte.plan.start import CONFIG_KEY
from halfbyte.quant import QuantizedWeight

Nearest = Callable[[Tensor], QuantizedWeight]


@dataclass(frozen=True, kw_only=True)
class StartError:
    """Squared error relative to the weights' squares: of base and start together, and of the `nearest` codes alone."""

    name: str
    weights: float
    nearest: float


@dataclass(frozen=True, kw_only=True)
class StartResult(QuantizeResult):
    """A quantized model with an adapter to begin at."""

    layers: tuple[StartError, ...]


def quantize_with_start(config: RunConfig, output: str | Path, *, on_progress: Progress | None = None) -> StartResult:
    """Write `config.model.path` in 4 bits, and beside it the adapter that `config.lora.init` says.

    "pissa": the adapter is a weight's `lora.r` largest singular directions, the base what they leave (arXiv
    2404.02948). "loftq": the base is quantized as ever, the adapter its error's largest directions; with more
    `lora.loftq_rounds` the base is quantized again as what the adapter leaves, and so on (arXiv 2310.08659). A weight
    is in memory in float32 some three times.

    Raises:
        ModelError, ConfigError, ResourceError: as `quantize_model`.
    """
    started, lora = time.perf_counter(), config.lora
    if lora.init == "cloq":
        raise ConfigError("needs a text", where="lora.init", why="cloq is chosen on it", fix="Set quant.calibrate")
    job = open_unquantized(config.model.path, output, config.quant)
    tokenizer, ranks = load_tokenizer(config.model.path), ranks_of(job, lora)
    recorded = {"init": lora.init, "r": lora.r}
    setattr(job.source.config, CONFIG_KEY, recorded)
    record: dict[str, Any] = {"base": config.model.path, "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    record |= {"versions": versions(), "start": recorded}
    starts, layers = dict[str, tuple[Tensor, Tensor]](), list[StartError]()
    with write_folder(output, expected_bytes=sum(job.sizes.values()) // 3) as folder:
        with ShardWriter(folder.path, header_bytes=job.header_bytes) as shards, BaseHash() as base:
            writer = FourBitWriter(job, shards, base, on_progress)
            writer.write_others()
            for name in (f"{target}.weight" for target in job.targets):
                target = writer.target(name)

                def nearest(values: Tensor, name: str = name) -> QuantizedWeight:
                    return writer.nearest(name, values)

                weight = nearest(target)
                if name in ranks:
                    error = _error(target, weight, None)
                    weight, start = (_pissa if lora.init == "pissa" else _loftq)(target, weight, lora, nearest)
                    starts[name] = start
                    layers.append(StartError(name=name, weights=_error(target, weight, start), nearest=error))
                writer.add(name, weight)
            shards.finish()
        job.finish(folder.path)
        folder.write_json("halfbyte.json", {**record, "layers": [asdict(layer) for layer in layers]})
        record |= {"base": str(output), "base_sha256": base.hexdigest()}
        write_start(folder.path, job, lora, starts, record)
    return StartResult(
        bytes_in=sum(job.sizes.values()), bytes_out=shards.bytes, quantized=len(job.targets),
        formats=dict(job.formats),
        bits_per_weight=writer.bits_per_weight, peak_memory=peak_memory(), seconds=time.perf_counter() - started,
        output=str(output), layers=tuple(layers),
    )  # fmt: skip


Start = tuple[QuantizedWeight, tuple[Tensor, Tensor]]


def _pissa(target: Tensor, plain: QuantizedWeight, lora: LoraConfig, nearest: Nearest) -> Start:
    a, b = principal(target, lora.r, lora.scaling)
    return nearest(torch.addmm(target, b, a, alpha=-1)), (a, b)


def _loftq(target: Tensor, plain: QuantizedWeight, lora: LoraConfig, nearest: Nearest) -> Start:
    weight = plain
    a, b = principal(target - weight.dequantize(torch.float32), lora.r, lora.scaling)
    for _ in range(lora.loftq_rounds - 1):
        weight = nearest(torch.addmm(target, b, a, alpha=-1))
        a, b = principal(target - weight.dequantize(torch.float32), lora.r, lora.scaling)
    return weight, (a, b)


def _error(target: Tensor, weight: QuantizedWeight, start: tuple[Tensor, Tensor] | None) -> float:
    left = target - weight.dequantize(torch.float32)
    if start is not None:
        left.addmm_(start[1], start[0], alpha=-1)
    return float(left.square_().sum() / target.square().sum())
