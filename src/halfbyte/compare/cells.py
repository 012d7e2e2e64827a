"""One run of one variant with one seed: a process of its own, whose outcome is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import write_file
from halfbyte.checkpoint.durable import remove_folder
from halfbyte.compare.variants import Variant
from halfbyte.config import RunConfig, load_config, settings_of
from halfbyte.errors import ConfigError

BASE_TERMS = ("linears_4bit", "linears_16bit", "embeddings", "norms_and_other")
"""Of a plan: the base's weights."""


@dataclass(frozen=True)
class Failure:
    """A command's error: its one line and its exit code."""

    line: str
    code: int


@dataclass(frozen=True)
class Cell:
    """One run's outcome.

    Attributes:
        settings: what it was run with; another run's outcome is not taken for its own.
        seconds: of the whole process.
        result: what `halfbyte train --json` said; empty where it failed.
        curve: (step, training loss).
        failure: None where it finished.
    """

    variant: str
    seed: int
    settings: list[str]
    seconds: float
    result: dict[str, Any] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    failure: Failure | None = None


@dataclass(frozen=True)
class Base:
    """A variant's base model.

    Attributes:
        path: of the model to train on.
        nbytes: of its weights while it trains, by the plan; None where the plan cannot tell.
        seconds: that making it took; 0 where it is quantized as it loads.
        bits: per weight of its linear layers, where it was made.
        failure: None where there is a base.
    """

    path: str
    nbytes: int | None = None
    seconds: float = 0.0
    bits: float | None = None
    failure: Failure | None = None


def variant_run(run: RunConfig, variant: Variant) -> RunConfig:
    """`run` with what `variant` sets. Raises ConfigError where that does not go together."""
    own = [setting.replace("{data}", run.data.train) for setting in variant.settings]
    try:
        return load_config(None, [*settings_of(run), *own])
    except ConfigError as error:
        where = error.where.removeprefix("--set ")
        raise ConfigError(f"variant {variant.name}: {error.what}", where=where, why=error.why, fix=error.fix) from None


def prepare_base(run: RunConfig, variant: Variant, folder: Path) -> Base:
    """The base that `variant` trains on: written by `halfbyte quantize` for data or a start, else `run`'s own.

    Args:
        run: as `variant_run` gives it.
        folder: where bases are kept; one that is there already was made by the same settings.
    """
    path, made = run.model.path, {}
    if run.quant.calibrate or run.lora.init != "random":
        output, record = folder / variant.name, folder / f"{variant.name}.json"
        settings = settings_of(run)
        if output.is_dir() and (kept := _read(record)).get("settings") == settings:
            made = kept["result"]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            if output.is_dir():
                remove_folder(output)  # made by other settings
            made, failed = run_command("quantize", settings, "--output", str(output))
            if failed:
                return Base(path, failure=failed)
            write_file(record, json.dumps({"settings": settings, "result": made}).encode())
        path = str(output)
    if variant.full:
        return Base(path)
    plan, _ = run_command("plan", _train_settings(run, path, 0), "--output", str(folder.parent / "runs" / "plan"))
    held = sum(plan.get("terms", {}).get(name, 0) for name in BASE_TERMS)
    return Base(path, held or None, made.get("seconds", 0.0), made.get("bits_per_weight"))


def kept_cell(run: RunConfig, variant: Variant, base: Base, seed: int, folder: Path) -> Cell | None:
    """The outcome of this very run, if it was finished before."""
    try:
        cell = Cell(**_read(_file(folder, variant, seed)))
    except TypeError:
        return None
    return cell if cell.settings == _train_settings(run, base.path, seed) and cell.failure is None else None


def run_cell(run: RunConfig, variant: Variant, base: Base, seed: int, folder: Path) -> Cell:
    """Train with `seed`, and keep the outcome."""
    settings, output = _train_settings(run, base.path, seed), folder / f"{variant.name}-{seed}"
    started = time.perf_counter()
    if variant.full:
        result, failed = _json_of([sys.executable, "-m", "halfbyte.compare.full", str(output), *settings])
    else:
        result, failed = run_command("train", settings, "--output", str(output), "--resume", "never")
    seconds = time.perf_counter() - started
    curve = _curve(output / "metrics.jsonl") if result else []
    cell = Cell(variant.name, seed, settings, seconds, result, curve, failed)
    write_file(_file(folder, variant, seed), json.dumps(asdict(cell)).encode())
    return cell


def _train_settings(run: RunConfig, path: str, seed: int) -> list[str]:
    settings = load_config(None, [*settings_of(run), f"model.path={path}", f"train.seed={seed}", "quant.calibrate="])
    return settings_of(settings)


def _file(folder: Path, variant: Variant, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{variant.name}-{seed}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _curve(path: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line.get("event") == "step"]


def run_command(command: str, settings: list[str], *more: str) -> tuple[dict[str, Any], Failure | None]:
    given = [argument for setting in settings for argument in ("--set", setting)]
    return _json_of([sys.executable, "-m", "halfbyte", command, *given, *more, "--json"])


def _json_of(command: list[str]) -> tuple[dict[str, Any], Failure | None]:
    """(the JSON on the last line of standard output, None) or ({}, what went wrong). It does not outlive us."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            said, complained = child.communicate()
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        lines = complained.strip().splitlines() or [f"exit {child.returncode} without a word"]
        return {}, Failure(lines[-1].removeprefix("halfbyte: "), child.returncode)
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return found, None
