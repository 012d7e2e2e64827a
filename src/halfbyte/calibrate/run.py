"""`halfbyte quantize` with quant.calibrate: scales and codes chosen on the user's text, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibrate.memory import text_within
from halfbyte.calibrate.sensitivity import Mix, measured_mix
from halfbyte.calibrate.start_folder import ranks_of, write_start
from halfbyte.calibrate.write import CalibratedWriter, LayerError
from halfbyte.checkpoint import versions, write_folder
from halfbyte.checkpoint.shard_writer import ShardWriter
from halfbyte.config import RunConfig
from halfbyte.data import load_data, samples_file
from halfbyte.dtypes import format_bytes
from halfbyte.errors import ConfigError, NumericsError, ResourceError
from halfbyte.model.base_hash import BaseHash
from halfbyte.model.compute_dtype import choose_compute_dtype
from halfbyte.model.lent import LentModel
from halfbyte.model.load import Progress
from halfbyte.model.memory import peak_memory
from halfbyte.model.quantize import QuantizeResult, open_unquantized, scale_text
from halfbyte.model.source import load_tokenizer, tokenizer_sha256
from halfbyte.quant.moments import DAMPING

CONFIG_KEY = "halfbyte_calibrated"
"""In config.json, so that it stays with the model when files are copied one by one."""

LARGE = 10**9
"""Parameters from which calibration takes long enough for faster products."""

Say = Callable[[str], None]
Match = Callable[[RunConfig, Path, Say], dict[str, Any]]
"""`halfbyte.train.match.match_start`."""


@dataclass(frozen=True, kw_only=True)
class CalibrateResult(QuantizeResult):
    """A quantized model whose codes were chosen on `tokens` tokens of text."""

    tokens: int
    predicted_peak_memory: int
    layers: tuple[LayerError, ...]
    sensitivities: dict[str, float]
    """Of the parts that quant.bits gave a format each: KL divergence by token with one alone in nf4; or empty."""
    matched: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def calibrate_model(
    config: RunConfig,
    output: str | Path,
    *,
    match: Match | None = None,
    say: Say = lambda text: None,
    on_progress: Progress | None = None,
) -> CalibrateResult:
    """Write `config.model.path` in 4 bits, its scales and codes such that its outputs on the text
    `config.quant.calibrate` are close; with `config.lora.init` "cloq" an adapter beside it makes
    up for most of the rest, which `match` then has `config.lora.match_steps` steps to bring closer still.

    Raises:
        ModelError, ConfigError: as `quantize_model`.
        DataError: the text cannot be read.
        ResourceError: the disk is full, or memory.budget too small for any text.
    """
    with samples_file(config.quant.calibrate) as text:
        return _calibrate(config, text, output, match, say, on_progress)


def _calibrate(
    config: RunConfig, text: str, output: str | Path, match: Match | None, say: Say, on_progress: Progress | None
) -> CalibrateResult:
    started = time.perf_counter()
    path, quant = config.model.path, config.quant
    if config.lora.init not in ("random", "cloq"):
        raise ConfigError(
            f"{config.lora.init!r} takes no text", where="lora.init",
            fix="Set it to cloq, which is chosen on the text, or leave out quant.calibrate",
        )  # fmt: skip
    job = open_unquantized(path, output, replace(quant, bits=0.0))  # which are spread as is measured here
    model, tokenizer = LentModel(job.source), load_tokenizer(path)
    ranks = ranks_of(job, config.lora) if config.lora.init == "cloq" else {}
    data = load_data(text, tokenizer, config.data)
    mix = Mix(formats={}, sensitivities={}, predicted=0)
    if quant.bits:
        mix = measured_mix(job, model, config, data, say, on_progress)
        job = replace(job, formats=mix.formats)
    (ids, counts), waiting, predicted = text_within(config, job.model, data)
    tokens = int(counts.sum())
    say(f"calibration: {tokens:,} tokens of {quant.calibrate}; about {format_bytes(predicted)} at the fullest moment")
    say(scale_text(quant))
    dtype, why = product_dtype(quant.compute_dtype, job.model.num_parameters())
    say(f"calibration: products in {str(dtype).removeprefix('torch.')} ({why})")
    calibrated = {
        "scale": quant.chosen_scale, "damping": DAMPING, "data": quant.calibrate, "data_sha256": data.report.sha256,
        "tokens": tokens, "adapter_rank": max(ranks.values(), default=0),
    }  # fmt: skip
    setattr(job.source.config, CONFIG_KEY, calibrated)
    record = {"base": path, "tokenizer_sha256": tokenizer_sha256(tokenizer), "versions": versions()}
    with write_folder(output, expected_bytes=sum(job.sizes.values()) // 3) as folder:
        with ShardWriter(folder.path, header_bytes=job.header_bytes) as shards, BaseHash() as base:
            written = CalibratedWriter(job, shards, base, ranks, on_progress)
            written.write(model, ids, counts, waiting, dtype)
            shards.finish()
        job.finish(folder.path)
        layers = [asdict(layer) for layer in written.layers]
        measured = {"sensitivities": mix.sensitivities} if mix.sensitivities else {}
        folder.write_json("halfbyte.json", {**record, "calibrated": calibrated, "layers": layers, **measured})
        if ranks:
            record |= {"base": str(output), "base_sha256": base.hexdigest(), "calibrated": calibrated}
            write_start(folder.path, job, config.lora, written.starts, record)
        matched = None
        if match and ranks and config.lora.match_steps:
            matched = _matched(match, replace(config, quant=replace(quant, calibrate=text)), folder.path, say)
    return CalibrateResult(
        bytes_in=sum(job.sizes.values()), bytes_out=shards.bytes, quantized=len(job.targets),
        formats=dict(job.formats),
        bits_per_weight=written.bits_per_weight, peak_memory=peak_memory(),
        predicted_peak_memory=max(predicted, mix.predicted, matched["planned_memory"] if matched else 0),
        seconds=time.perf_counter() - started, output=str(output), tokens=tokens, layers=tuple(written.layers),
        sensitivities=mix.sensitivities, matched=matched,
    )  # fmt: skip


def product_dtype(setting: str, parameters: int) -> tuple[torch.dtype, str]:
    """The dtype that the text's products run in, and why."""
    if setting == "auto" and parameters < LARGE:
        return torch.float32, "the model is small, and bfloat16 would leave 1 % more of the outputs' error"
    dtype, why = choose_compute_dtype(setting)
    if dtype == torch.float16:
        return torch.float32, "activations may be too large for float16"
    return dtype, why


def _matched(match: Match, config: RunConfig, folder: Path, say: Say) -> dict[str, Any] | None:
    try:
        matched = match(config, folder, say)
    except (ConfigError, NumericsError, ResourceError) as error:
        say(f"start: not matched to the 16-bit model: {error}")
        return None
    say(
        f"start: {matched['steps']} steps towards the 16-bit model's predictions in {matched['seconds']:.1f} s, "
        f"KL {matched['kl_first']:.4f} by token in their first quarter, {matched['kl_last']:.4f} in the last, "
        "on other samples"
    )
    return matched
