"""The comparison: every variant with every seed until the time is up, then figures for all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import versions, write_file
from halfbyte.compare.cells import Base, Cell, kept_cell, prepare_base, run_cell, settings_of, variant_run
from halfbyte.compare.page import page
from halfbyte.compare.statistics import Mean, difference, mean
from halfbyte.compare.variants import Variant
from halfbyte.config import RunConfig, load_config
from halfbyte.errors import ConfigError, HalfbyteError
from halfbyte.plan import check_run


@dataclass(frozen=True)
class Row:
    """What a variant came to; losses are held-out losses per supervised token, sizes in bytes.

    Attributes:
        seeds: those that finished.
        before, after: means over the seeds; None where none finished.
        difference: of `after` from the reference's, over the seeds that both have; None for the reference.
        seconds: mean of a run's, quantizing the base apart; prepare_seconds: of quantizing it.
        base_bytes: of the base's weights while it trains.
        failed: the first error's line.
    """

    name: str
    about: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    before: float | None = None
    after: Mean | None = None
    difference: Mean | None = None
    seconds: float | None = None
    prepare_seconds: float = 0.0
    tokens_per_s: float | None = None
    peak_memory: int | None = None
    base_bytes: int | None = None
    failed: str = ""


@dataclass(frozen=True)
class Comparison:
    """All rows, the first of them the reference, and where the page lies."""

    rows: list[Row]
    wanted_seeds: int
    seconds: float
    page: str

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def compare(
    run: RunConfig, variants: Sequence[Variant], output: Path, *, seeds: int, minutes: float,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:  # fmt: skip
    """Train each of `variants` with each seed in a process of its own, and write OUTPUT/report.html and compare.json.

    Seed by seed, so that all variants have as many when the time is up: a run that by the variant's last one would not
    end within `minutes` is not begun (the first seed's always are). Runs that finished before are not run again.

    Args:
        run: with data.train, data.eval and the steps; train.seed is the first seed.
        variants: the first one is what the others are compared with.

    Raises:
        ConfigError: data, model or a variant's settings cannot be used.
        HalfbyteError: no variant finished.
    """
    started, runs_folder = time.perf_counter(), output / "runs"
    if not run.data.eval:
        raise ConfigError("is not set", where="data.eval", why="held-out loss is compared", fix="Give --eval-data")
    check_run(run)
    run = load_config(None, [*settings_of(run), "train.output="])  # each has a folder of its own
    runs = {variant.name: _checked(run, variant) for variant in variants}
    bases = {}
    for variant in variants:
        bases[variant.name] = prepare_base(runs[variant.name], variant, output / "bases")
        if bases[variant.name].seconds:
            say(f"{variant.name}: base quantized in {bases[variant.name].seconds:.0f} s")
    cells: dict[str, list[Cell]] = {variant.name: [] for variant in variants}
    for seed in range(run.train.seed, run.train.seed + seeds):
        for variant in variants:
            done = cells[variant.name]
            if bases[variant.name].failed or any(cell.failed for cell in done):
                continue
            left = minutes * 60 - (time.perf_counter() - started)
            cell = kept_cell(runs[variant.name], variant, bases[variant.name], seed, runs_folder)
            how = "kept from before"
            if cell is None:
                if done and left < done[-1].seconds:
                    say(f"{variant.name}, seed {seed}: left out, {left:.0f} s of {minutes:g} minutes are left")
                    continue
                cell = run_cell(runs[variant.name], variant, bases[variant.name], seed, runs_folder)
                how = f"{cell.seconds:.0f} s"
            done.append(cell)
            say(f"{variant.name}, seed {seed}: {cell.failed or _losses(cell)} ({how})")
    rows = [_row(variant, bases[variant.name], cells[variant.name], cells[variants[0].name]) for variant in variants]
    if not any(row.seeds for row in rows):
        raise HalfbyteError(f"no variant could be trained; {rows[0].name}: {rows[0].failed}")
    result = Comparison(rows, seeds, time.perf_counter() - started, str(output / "report.html"))
    everything = {
        **result.to_dict(), "settings": settings_of(run), "versions": versions(),
        "cells": {name: [asdict(cell) for cell in done] for name, done in cells.items()},
    }  # fmt: skip
    write_file(output / "compare.json", json.dumps(everything, indent=1).encode())
    write_file(output / "report.html", page(result, cells, settings_of(run)).encode())
    return result


def _checked(run: RunConfig, variant: Variant) -> RunConfig:
    try:
        return variant_run(run, variant)
    except ConfigError as error:
        raise ConfigError(
            f"variant {variant.name}: {error.what}", where=error.where, why=error.why, fix=error.fix
        ) from None


def _losses(cell: Cell) -> str:
    return f"held-out loss {cell.result['eval_loss_before']:.4f} -> {cell.result['eval_loss']:.4f}"


def _row(variant: Variant, base: Base, cells: list[Cell], reference: list[Cell]) -> Row:
    failed = base.failed or next((cell.failed for cell in cells if cell.failed), "")
    done = [cell for cell in cells if not cell.failed]
    if not done:
        return Row(variant.name, variant.about, variant.settings, failed=failed)
    after = {cell.seed: cell.result["eval_loss"] for cell in done}
    others = {cell.seed: cell.result["eval_loss"] for cell in reference if not cell.failed}
    results = [cell.result for cell in done]
    return Row(
        variant.name, variant.about, variant.settings, tuple(after), tuple(after.values()),
        before=mean([result["eval_loss_before"] for result in results]).value, after=mean(list(after.values())),
        difference=None if done[0].variant == reference[0].variant else difference(after, others),
        seconds=mean([cell.seconds for cell in done]).value, prepare_seconds=base.seconds,
        tokens_per_s=mean([result["tokens_per_s"] for result in results]).value,
        peak_memory=max(result["peak_memory"] for result in results),
        base_bytes=results[0].get("base_bytes", base.nbytes), failed=failed,
    )  # fmt: skip
