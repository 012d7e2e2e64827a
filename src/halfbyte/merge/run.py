"""`halfbyte.merge`: a base and an adapter as one model, measured against what was trained before it gets its name."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint import Adapter, check_base, load_adapter, write_folder
from halfbyte.checkpoint.shard_writer import write_shards
from halfbyte.checkpoint.shards import SafetensorsFolder
from halfbyte.config import RunConfig
from halfbyte.errors import ConfigError, NumericsError
from halfbyte.merge.base import MergeBase, open_base
from halfbyte.merge.drift import Drift, DriftMeter, Probe, probe_of
from halfbyte.merge.forward import LentModel
from halfbyte.merge.record import CONFIG_KEY, card, check_output, record, refuse_merged
from halfbyte.merge.sixteen import merged_tensors
from halfbyte.merge.update import Updates, folded, updates_of
from halfbyte.model.load import Progress
from halfbyte.model.memory import peak_memory
from halfbyte.model.quantize import COPIED_FILES
from halfbyte.model.source import load_tokenizer, locate, tokenizer_sha256

FORMATS = ("16bit",)
MAX_DRIFT = {"16bit": 0.01}
"""KL from base + adapter, nats per token, above which a merge is refused unless told otherwise."""
PROMPTS = 50
"""Samples that drift is measured on."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """A merged model. Sizes in bytes."""

    output: str
    format: str
    dtype: str
    base: str
    """Which weights the update was added to: "quantized" or "original"."""
    drift: Drift
    base_sha256: str
    adapter_sha256: str
    layers: int
    """Weights that the adapter changed."""
    bytes_out: int
    peak_memory: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    """What is merged, checked: nothing is wrong that could have been known."""

    base: MergeBase
    base_sha256: str
    adapter: Adapter
    updates: Updates
    tokenizer: Any
    probe: Probe


def merge(
    config: RunConfig, adapter: str | Path, output: str | Path, *, format: str = "16bit",
    max_drift: float | None = None, say: Say = lambda text: None, on_progress: Progress | None = None,
) -> MergeResult:  # fmt: skip
    """Write the base `config.model.path` with the adapter merged into it, one tensor in memory at a time.

    Args:
        config: `model.path`; `data.eval` (what drift is measured on, else what the adapter recorded); `quant` where
            the adapter records none.
        format: "16bit": standard safetensors.
        max_drift: most KL from base + adapter, nats per token; None: `MAX_DRIFT`.
        say: told each choice and note, a sentence each.

    Raises:
        AdapterError: the adapter cannot be used, is for another base, or is merged already.
        ConfigError: `output` holds something or overlaps an input; an unknown `format`.
        NumericsError: the result is further from base + adapter than `max_drift`, or does not fit its dtype; nothing
            is left under `output`.
    """
    started = time.perf_counter()
    if format not in FORMATS:
        raise ConfigError(f"{format!r} is not a format", where="--format", fix=f"Choose {', '.join(FORMATS)}")
    check_output(Path(output), locate(config.model.path), Path(adapter))
    job = _prepare(config, Path(adapter), say, on_progress)
    dtype = job.base.dtype()
    dtype_name = str(dtype).removeprefix("torch.")
    say(f"dtype {dtype_name}: that of the base's weights")
    merged = record(job.base, job.base_sha256, job.adapter, form=f"16bit {dtype_name}", onto="quantized")
    sizes = sum(p.numel() * dtype.itemsize for p in job.base.model.parameters())
    with write_folder(output, expected_bytes=sizes) as writer:
        header = sum(2 * len(name) + 200 for name in job.base.names)
        _, bytes_out = write_shards(
            writer.path, merged_tensors(job.base, job.updates, dtype, on_progress), header_bytes=header
        )
        drift = _drift(job, SafetensorsFolder(writer.path).read)
        say(f"drift from base + adapter on {drift.on}: {drift}")
        _check_drift(drift, MAX_DRIFT[format] if max_drift is None else max_drift)
        _write_config(job, dtype, merged, writer.path)
        writer.write_json("halfbyte.json", {"merged": merged, "drift": drift.to_dict()})
        writer.write_bytes("README.md", card(merged, drift.to_dict(), _use(Path(output))).encode())
    return MergeResult(
        output=str(output), format=format, dtype=dtype_name, base="quantized", drift=drift,
        base_sha256=job.base_sha256, adapter_sha256=merged["adapter_sha256"], layers=len(job.updates),
        bytes_out=bytes_out, peak_memory=peak_memory(), seconds=time.perf_counter() - started,
    )  # fmt: skip


def _prepare(config: RunConfig, folder: Path, say: Say, on_progress: Progress | None) -> _Job:
    """Read and check everything, the cheapest first; the base's hash, which reads it once, comes last."""
    adapter = load_adapter(folder)
    quant = config.quant
    if adapter.info.get("quant"):
        known = {key: adapter.info["quant"][key] for key in ("quant_type", "blocksize", "double_quant")}
        quant = replace(quant, **known)
    base = open_base(config.model.path, quant)
    updates = updates_of(adapter, base.model)
    tokenizer = load_tokenizer(config.model.path)
    probe = _probe(config, adapter, tokenizer)
    digest = base.sha256(on_progress)
    refuse_merged(base, digest, adapter)
    notes = check_base(
        adapter, digest, base=config.model.path, quant=base.recipe(), tokenizer_sha256=tokenizer_sha256(tokenizer)
    )
    for note in notes:
        say(note)
    return _Job(base, digest, adapter, updates, tokenizer, probe)


def _probe(config: RunConfig, adapter: Adapter, tokenizer: Any) -> Probe:
    """What drift is measured on: the file given, else the run's evaluation or training data, else general texts."""
    recorded = adapter.info.get("config", {}).get("data", {})
    data = replace(config.data, **{key: recorded[key] for key in ("max_seq_len", "mask_prompt") if key in recorded})
    if config.data.eval:
        return probe_of(config.data.eval, tokenizer, data, PROMPTS)
    there = [path for path in (recorded.get("eval"), recorded.get("train")) if path and Path(path).is_file()]
    return probe_of(there[0] if there else "", tokenizer, data, PROMPTS)


def trained_weights(base: MergeBase, updates: Updates) -> Callable[[str], Tensor]:
    """Base + adapter in float32: what training computes with, without any kernel's rounding."""

    def weight(name: str) -> Tensor:
        if name not in base.targets:
            stored = base.unquantized(name)
            return stored if name not in updates else stored.float() + updates[name].rows()
        values = folded(base.quantized(name), updates.get(name))
        return values.T.contiguous() if base.is_transposed(name) else values

    return weight


def _drift(job: _Job, merged: Callable[[str], Tensor]) -> Drift:
    meter = DriftMeter(LentModel(job.base.source), job.probe, trained_weights(job.base, job.updates))
    return meter.measure(merged)[0]


def _check_drift(drift: Drift, most: float) -> None:
    if not drift.kl <= most:
        raise NumericsError(
            "the merged model is not what was trained", where="--max-drift",
            why=f"KL {drift.kl:.3g} nats/token, more than {most:g}; {drift}",
            fix="Serve base and adapter apart, choose another --format or --base, or raise --max-drift",
        )  # fmt: skip


def _write_config(job: _Job, dtype: torch.dtype, merged: dict[str, Any], folder: Path) -> None:
    """config.json without quantization fields, tokenizer, chat template, generation config."""
    source = job.base.source
    config = source.config
    config.dtype = dtype
    config.architectures = [type(job.base.model).__name__]
    setattr(config, CONFIG_KEY, merged)
    config.save_pretrained(folder)
    job.tokenizer.save_pretrained(folder)
    for file in COPIED_FILES:
        if source.path.is_dir() and (source.path / file).is_file():
            shutil.copyfile(source.path / file, folder / file)


def _use(output: Path) -> str:
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{output.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{output.name}")\n```\n'
    )
