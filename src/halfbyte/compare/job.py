"""The comparison: every variant with every seed until the time is up, then figures for all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import versions, write_file
from halfbyte.compare.cells import Base, Cell, Failure, kept_cell, prepare_base, run_cell, variant_run
from halfbyte.compare.page import comparison_page
from halfbyte.compare.statistics import Mean, difference, mean
from halfbyte.compare.variants import Variant
from halfbyte.config import RunConfig, load_config, settings_of
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


@dataclass
class Way:
    """A variant on its way: its run, its base, and its cells so far."""

    variant: Variant
    run: RunConfig
    base: Base = field(default_factory=lambda: Base(""))
    cells: list[Cell] = field(default_factory=list)

    @property
    def failure(self) -> Failure | None:
        """The first, after which it is not run again."""
        return self.base.failure or next((cell.failure for cell in self.cells if cell.failure), None)


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
        HalfbyteError: no variant finished; with the exit code of the first that failed.
    """
    started = time.perf_counter()
    if not run.data.eval:
        raise ConfigError("is not set", where="data.eval", why="held-out loss is compared", fix="Give --eval-data")
    check_run(load_config(None, [*settings_of(run), "quant.calibrate=", "quant.bits=0", "lora.init=random"]))
    run = load_config(None, [*settings_of(run), "train.output="])  # each has a folder of its own
    ways = [Way(variant, variant_run(run, variant)) for variant in variants]
    for way in ways:
        way.base = prepare_base(way.run, way.variant, output / "bases")
        if way.base.seconds:
            say(f"{way.variant.name}: base quantized in {way.base.seconds:.0f} s")
    _run_all(ways, range(run.train.seed, run.train.seed + seeds), output / "runs", started + minutes * 60, say)
    rows = [_row(way, ways[0].cells) for way in ways]
    if not any(row.seeds for row in rows):
        error = HalfbyteError("; ".join(dict.fromkeys(f"{row.name}: {row.failed}" for row in rows)))
        error.exit_code = next(way.failure.code for way in ways if way.failure)
        raise error
    result = Comparison(rows, seeds, time.perf_counter() - started, str(output / "report.html"))
    cells = {way.variant.name: way.cells for way in ways}
    everything = {
        **result.to_dict(), "settings": settings_of(run), "versions": versions(),
        "cells": {name: [asdict(cell) for cell in done] for name, done in cells.items()},
    }  # fmt: skip
    write_file(output / "compare.json", json.dumps(everything, indent=1).encode())
    write_file(output / "report.html", comparison_page(result, cells, settings_of(run)).encode())
    return result


def _run_all(
    ways: Sequence[Way], seeds: Iterable[int], folder: Path, deadline: float, say: Callable[[str], None]
) -> None:
    left_out = 0
    for seed in seeds:
        for way in ways:
            if way.failure:
                continue
            cell = kept_cell(way.run, way.variant, way.base, seed, folder)
            how = "kept from before"
            if cell is None:
                if way.cells and time.perf_counter() + way.cells[-1].seconds > deadline:
                    left_out += 1
                    continue
                cell = run_cell(way.run, way.variant, way.base, seed, folder)
                how = f"{cell.seconds:.0f} s"
            way.cells.append(cell)
            say(f"{way.variant.name}, seed {seed}: {cell.failure.line if cell.failure else _losses(cell)} ({how})")
    if left_out:
        say(f"runs left out, since they would not have ended in time: {left_out}; the same command goes on with them")


def _losses(cell: Cell) -> str:
    return f"held-out loss {cell.result['eval_loss_before']:.4f} -> {cell.result['eval_loss']:.4f}"


def _row(way: Way, reference: Sequence[Cell]) -> Row:
    variant, base, failed = way.variant, way.base, way.failure.line if way.failure else ""
    done = [cell for cell in way.cells if not cell.failure]
    if not done:
        return Row(variant.name, variant.about, variant.settings, failed=failed)
    after = {cell.seed: cell.result["eval_loss"] for cell in done}
    others = {cell.seed: cell.result["eval_loss"] for cell in reference if not cell.failure}
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
