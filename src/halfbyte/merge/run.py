"""`halfbyte.merge`: a base and an adapter as one model, measured against what was trained before it gets its name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import check_base, load_adapter, write_folder
from halfbyte.config import RunConfig
from halfbyte.errors import ConfigError, NumericsError
from halfbyte.merge.base import open_base
from halfbyte.merge.drift import Drift, DriftMeter, Probe, closest, probe_of
from halfbyte.merge.fold import Fold, check_near, open_original
from halfbyte.merge.formats import FORMATS, Job, Written
from halfbyte.merge.forward import LentModel, Weights
from halfbyte.merge.four import Survived
from halfbyte.merge.memory import check_budget, predicted_peak
from halfbyte.merge.record import card, check_output, refuse_merged
from halfbyte.merge.sixteen import rounded
from halfbyte.merge.update import updates_of
from halfbyte.model.load import Progress
from halfbyte.model.memory import peak_memory
from halfbyte.model.source import load_tokenizer, locate, tokenizer_sha256

BASES = ("quantized", "original", "auto")
PROMPTS = 50
"""Samples that drift is measured on."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """A merged model. Sizes in bytes."""

    output: str
    format: str
    form: str
    """The format and its numbers: "16bit bfloat16", "gguf Q8_0"."""
    base: str
    """Which weights the update was added to: "quantized" or "original"."""
    drift: Drift
    candidates: dict[str, Drift]
    """With --base auto: what each base would have given."""
    base_sha256: str
    adapter_sha256: str
    survived: tuple[Survived, ...]
    """Of a 4-bit merge: what became of each layer's update."""
    layers: int
    """Weights that the adapter changed."""
    bytes_out: int
    peak_memory: int
    predicted_peak_memory: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def merge(
    config: RunConfig, adapter: str | Path, output: str | Path, *, format: str = "16bit", base: str = "quantized",
    original: str = "", gguf_type: str = "F16", max_drift: float | None = None, say: Say = lambda text: None,
    on_progress: Progress | None = None,
) -> MergeResult:  # fmt: skip
    """Write the base `config.model.path` with the adapter merged into it, one tensor in memory at a time.

    Args:
        config: `model.path`; `data.eval` (what drift is measured on, else what the adapter recorded); `quant` where
            the adapter records none; `memory.budget`.
        format: "16bit": standard safetensors; "4bit": bitsandbytes' format, its codes chosen on `data.train` (else
            what the adapter recorded); "gguf": one file for llama.cpp;
            "gguf-lora": the adapter alone, likewise.
        base: "quantized": onto the decoded 4-bit weights that were trained on; "original": onto the 16-bit weights
            they were made of; "auto": whichever is closer to base + adapter.
        original: the model with these 16-bit weights, where `config.model.path` holds 4-bit ones.
        gguf_type: of "gguf": "F16", "Q8_0", "Q4_0", ...
        max_drift: most KL from base + adapter, nats per token; None: what the format allows for.
        say: told each choice and note, a sentence each.

    Raises:
        AdapterError: the adapter cannot be used, is for another base, or is merged already.
        ConfigError: `output` holds something or overlaps an input; an unknown choice.
        ResourceError: it would not fit `memory.budget`, or the disk.
        NumericsError: the result is further from base + adapter than `max_drift`, or does not fit its dtype; nothing
            is left under `output`.
    """
    started = time.perf_counter()
    _check_choice("--format", format, tuple(FORMATS))
    _check_choice("--base", base, BASES)
    check_output(Path(output), locate(config.model.path), Path(adapter))
    job = _prepare(config, Path(adapter), Path(output), gguf_type, say, on_progress)
    chosen = FORMATS[format](job)
    meter = DriftMeter(LentModel(job.fold.base.source), _probe(job), job.fold.weight)
    predicted = predicted_peak(job.fold.base, meter.probe, chosen.text_rows) + chosen.mapped_bytes
    check_budget(config, predicted)
    fold, candidates = _choose(job, meter, base, original, say)
    with write_folder(output, expected_bytes=chosen.expected_bytes) as writer:
        written = chosen.write(fold, writer.path, on_progress)
        drift = _measure(meter, written, chosen.max_drift if max_drift is None else max_drift, say)
        merged = job.record(chosen.form, fold.onto)
        said = None if drift is None else drift.to_dict()
        writer.write_json("halfbyte.json", {"merged": merged, "drift": said})
        writer.write_bytes("README.md", card(merged, said, written.use).encode())
    return MergeResult(
        output=str(output), format=format, form=chosen.form, base=fold.onto, drift=drift, candidates=candidates,
        base_sha256=job.base_sha256, adapter_sha256=merged["adapter_sha256"], survived=written.survived,
        layers=len(fold.updates), bytes_out=written.bytes, peak_memory=peak_memory(),
        predicted_peak_memory=predicted,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{value!r} is not a choice", where=option, fix=f"Choose {', '.join(choices)}")


def _prepare(
    config: RunConfig, folder: Path, output: Path, gguf_type: str, say: Say, on_progress: Progress | None
) -> Job:
    """Read and check everything, the cheapest first; the base's hash, which reads it once, comes last."""
    adapter = load_adapter(folder)
    quant = config.quant
    if adapter.info.get("quant"):
        known = {key: adapter.info["quant"][key] for key in ("quant_type", "blocksize", "double_quant")}
        quant = replace(quant, **known)
    base = open_base(config.model.path, quant)
    updates = updates_of(adapter, base.model)
    tokenizer = load_tokenizer(config.model.path)
    digest = base.sha256(on_progress)
    refuse_merged(base, digest, adapter)
    notes = check_base(
        adapter, digest, base=config.model.path, quant=base.recipe(), tokenizer_sha256=tokenizer_sha256(tokenizer)
    )
    for note in notes:
        say(note)
    recorded = adapter.info.get("config", {}).get("data", {})
    data = replace(config.data, **{key: recorded[key] for key in ("max_seq_len", "mask_prompt") if key in recorded})
    return Job(Fold(base, updates), digest, adapter, tokenizer, output, gguf_type, data, say)


def _probe(job: Job) -> Probe:
    """What drift is measured on: the file given, else the run's evaluation or training data, else general texts."""
    recorded = job.adapter.info.get("config", {}).get("data", {})
    if job.data.eval:
        return probe_of(job.data.eval, job.tokenizer, job.data, PROMPTS)
    there = [path for path in (recorded.get("eval"), recorded.get("train")) if path and Path(path).is_file()]
    return probe_of(there[0] if there else "", job.tokenizer, job.data, PROMPTS)


def _choose(job: Job, meter: DriftMeter, base: str, path: str, say: Say) -> tuple[Fold, dict[str, Drift]]:
    """The fold to write, and the drift of both where both were tried, each in the base's 16-bit dtype."""
    if base == "quantized":
        return job.fold, {}
    original = open_original(job.fold.base, path)
    distance = check_near(job.fold.base, original)
    say(f"original: {original.source.label}, its weights {distance:.1%} of their norm from the 4-bit ones")
    onto_original = replace(job.fold, original=original)
    if base == "original":
        return onto_original, {}
    dtype = job.fold.base.dtype()

    def in_16_bits(fold: Fold) -> Weights:
        return lambda name: rounded(fold.weight(name), dtype, name)

    folds = (job.fold, onto_original)
    drifts = meter.measure(*map(in_16_bits, folds))
    for fold, drift in zip(folds, drifts, strict=True):
        say(f"onto the {fold.onto} base: {drift}")
    chosen = closest(drifts)
    say(f"base: {folds[chosen].onto}, which is closer to base + adapter")
    return folds[chosen], {fold.onto: drift for fold, drift in zip(folds, drifts, strict=True)}


def _measure(meter: DriftMeter, written: Written, most: float, say: Say) -> Drift:
    drift = meter.measure(written.weights)[0]
    say(f"drift from base + adapter on {drift.on}: {drift}")
    if not drift.kl <= most:
        raise NumericsError(
            "the merged model is not what was trained", where="--max-drift",
            why=f"KL {drift.kl:.3g} nats/token, more than {most:g}; {drift}",
            fix="Serve base and adapter apart, choose another --format or --base, or raise --max-drift",
        )  # fmt: skip
    return drift
