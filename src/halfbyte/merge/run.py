"""`halfbyte.merge`: a base and its adapters as one model, measured before it gets its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import check_base, write_folder
from halfbyte.config import RunConfig, hold_to
from halfbyte.errors import ConfigError, NumericsError
from halfbyte.kernels.buffers import steady_memory
from halfbyte.merge.base import open_base
from halfbyte.merge.combine import Combine
from halfbyte.merge.drift import Drift, DriftMeter, Probe, closest, joined, probe_of
from halfbyte.merge.feedback import Survived
from halfbyte.merge.fold import Fold, check_near, open_original
from halfbyte.merge.formats import ADAPTERS, FORMATS
from halfbyte.merge.job import Job, Written
from halfbyte.merge.memory import check_budget, predicted_peak
from halfbyte.merge.parts import Part, read_parts, refuse_dora, refuse_start, template_hash
from halfbyte.merge.record import card, check_output, refuse_merged
from halfbyte.merge.sixteen import rounded
from halfbyte.merge.tables import refuse_rows, tables_of, tokenizer_of
from halfbyte.merge.update import sum_of, updates_of
from halfbyte.model.lent import LentModel, Weights
from halfbyte.model.load import Progress
from halfbyte.model.memory import peak_memory
from halfbyte.model.source import locate

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
    adapters: list[dict[str, Any]]
    """{"adapter": folder, "adapter_sha256": ..., "weight": ...} each."""
    survived: tuple[Survived, ...]
    """Of a 4-bit merge: what became of each layer's update."""
    layers: int
    """Weights that the adapters changed."""
    rows: dict[str, int]
    """Of embedding and head, by parameter: how many rows an adapter trained."""
    bytes_out: int
    peak_memory: int
    predicted_peak_memory: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


@steady_memory()
def merge(
    config: RunConfig, adapter: str | Path | Mapping[str, float], output: str | Path, *, format: str = "16bit",
    base: str = "quantized", original: str = "", gguf_type: str = "F16", combine: str = "cat", rank: int = 0,
    density: float = 0.2, any_template: bool = False, max_drift: float | None = None, say: Say = lambda text: None,
    on_progress: Progress | None = None,
) -> MergeResult:  # fmt: skip
    """Write the base `config.model.path` with adapters merged into it, one tensor in memory at a time.

    Args:
        config: `model.path`; `data.eval` (what drift is measured on, else what the adapters recorded); `quant` where
            they record none; `memory.budget`.
        adapter: a folder, or how much of each of several: the sum of their updates is merged, exactly.
        format: "16bit": standard safetensors; "4bit": bitsandbytes' format, its codes chosen on `data.train` (else
            what the adapters recorded); "gguf": one file for llama.cpp; "gguf-lora": the adapters alone, likewise;
            "adapter": the adapters alone, as one in PEFT's format.
        base: "quantized": onto the decoded 4-bit weights that were trained on; "original": onto the 16-bit weights
            they were made of; "auto": whichever is closer to base + adapter.
        original: the model with these 16-bit weights, where `config.model.path` holds 4-bit ones.
        gguf_type: of "gguf": "F16", "Q8_0", "Q4_0", ...
        combine: of "adapter": how several become one (`Combine`).
        rank: its rank.
        density: share of each update that `combine` keeps.
        any_template: merge adapters that were trained with another chat template than the model's, which is written.
        max_drift: most KL from base + adapters, nats per token; None: what the format allows for.
        say: told each choice and note, a sentence each.

    Raises:
        AdapterError: an adapter cannot be used, is for another base, or is merged already.
        ConfigError: `output` holds something or overlaps an input; an unknown choice.
        ResourceError: it would not fit `memory.budget`, or the disk.
        NumericsError: the result is further from base + adapters than `max_drift`, or does not fit its dtype; nothing
            is left under `output`.
    """
    started = time.perf_counter()
    hold_to(config.limits)
    weights = adapter if isinstance(adapter, Mapping) else {str(adapter): 1.0}
    way = Combine(how=combine, rank=rank, density=density, seed=config.train.seed)
    _check_choices(format, base, way)
    check_output(Path(output), locate(config.model.path), *map(Path, weights))
    parts = _parts(weights, base, format)
    job = _prepare(config, parts, any_template, say, on_progress)
    job = replace(job, output=Path(output), gguf_type=gguf_type, combine=way)
    chosen = FORMATS[format](job)
    meter = DriftMeter(LentModel(job.fold.base.source), _probe(job), job.fold.weight)
    predicted = predicted_peak(job.fold.base, meter.probe, chosen)
    check_budget(config, predicted)
    fold, candidates = _choose(job, meter, base, original, say)
    with write_folder(output, expected_bytes=chosen.expected_bytes) as writer:
        written = chosen.write(fold, writer.path, on_progress)
        drift = _measure(meter, written, chosen.max_drift if max_drift is None else max_drift)
        merged = job.record(chosen.form, fold.onto)
        survived = {"survived": [asdict(layer) for layer in written.survived]} if written.survived else {}
        writer.write_json("halfbyte.json", {**written.info, **survived, "merged": merged, "drift": drift.to_dict()})
        writer.write_bytes("README.md", card(merged, drift.to_dict(), written.use).encode())
    return MergeResult(
        output=str(output), format=format, form=chosen.form, base=fold.onto, drift=drift, candidates=candidates,
        base_sha256=job.base_sha256, adapters=merged["adapters"], survived=written.survived,
        layers=len(fold.updates), rows=fold.trained_rows, bytes_out=written.bytes, peak_memory=peak_memory(),
        predicted_peak_memory=predicted, seconds=time.perf_counter() - started,
    )  # fmt: skip


def _check_choices(format: str, base: str, combine: Combine) -> None:
    for option, value, choices in (("--format", format, tuple(FORMATS)), ("--base", base, BASES)):
        if value not in choices:
            raise ConfigError(f"{value!r} is not a choice", where=option, fix=f"Choose {', '.join(choices)}")
    if format in ADAPTERS and base != "quantized":
        raise ConfigError(f"is not for --format {format}", where="--base", why="no base is written")
    if format != "adapter" and combine.how != "cat":
        raise ConfigError(
            f"{combine.how} is not for --format {format}", where="--combine", why="which takes the exact sum",
            fix="Combine with --format adapter, then merge the adapter that this gives",
        )  # fmt: skip


def _parts(weights: Mapping[str, float], base: str, format: str) -> tuple[Part, ...]:
    parts = read_parts(weights)
    refuse_dora(parts, alone=format in ADAPTERS)
    refuse_rows(parts, alone=format in ADAPTERS)
    if base != "quantized":
        refuse_start(parts)
    return parts


def _prepare(
    config: RunConfig, parts: tuple[Part, ...], any_template: bool, say: Say, on_progress: Progress | None
) -> Job:
    """Check everything, the cheapest first; the base's hash, which reads it once, comes last."""
    recipe: dict[str, Any] = next((part.adapter.info["quant"] for part in parts if part.adapter.info.get("quant")), {})
    base = open_base(config.model.path, config.quant.with_recipe(recipe) if recipe else config.quant)
    parts = tuple(replace(part, updates=updates_of(part.adapter, base.model)) for part in parts)
    tokenizer = tokenizer_of(parts, config.model.path)
    hashes = [template_hash(part, tokenizer, base.source.label, any_template=any_template) for part in parts]
    digest = base.sha256(on_progress)
    for part, tokens in zip(parts, hashes, strict=True):
        refuse_merged(base, digest, part)
        notes = check_base(
            part.adapter, digest, base=config.model.path, quant=base.recipe(), tokenizer_sha256=tokens
        )  # fmt: skip
        for note in notes:
            say(note)
    recorded = next((part.data for part in parts if part.data), {})
    data = replace(config.data, **{key: recorded[key] for key in ("max_seq_len", "mask_prompt") if key in recorded})
    tables, base = tables_of(parts[0], base)
    fold = Fold(base, sum_of([(part.weight, part.updates) for part in parts]), tables=tables)
    return Job(fold=fold, base_sha256=digest, parts=parts, tokenizer=tokenizer, data=data, say=say)


def _probe(job: Job) -> Probe:
    """What drift is measured on: the file given, else the runs' evaluation or training data, else general texts."""
    if job.data.eval:
        return probe_of(job.data.eval, job.tokenizer, job.data, PROMPTS)
    there = list(dict.fromkeys(file for part in job.parts if (file := part.file("eval", "train")))) or [""]
    return joined([probe_of(file, job.tokenizer, job.data, -(-PROMPTS // len(there))) for file in there])


def _choose(job: Job, meter: DriftMeter, base: str, path: str, say: Say) -> tuple[Fold, dict[str, Drift]]:
    """The fold to write, and the drift of both where both were tried, each in the base's 16-bit dtype."""
    if base == "quantized":
        return job.fold, {}
    original = open_original(job.fold.base, path)
    distance = check_near(job.fold.base, original)
    say(f"original: {original.source.label}, its weights {distance:.1%} of their norm from the quantized ones")
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


def _measure(meter: DriftMeter, written: Written, most: float) -> Drift:
    drift = meter.measure(written.weights)[0]
    if not drift.kl <= most:
        raise NumericsError(
            "the merged model is not what was trained", where="--max-drift",
            why=f"KL {drift.kl:.3g} nats/token, more than {most:g}; {drift}",
            fix="Serve base and adapter apart, choose another --format or --base, or raise --max-drift",
        )  # fmt: skip
    return drift
