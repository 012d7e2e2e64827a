"""``halfbyte compare``."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.common import (
    AsJson,
    Config,
    Debug,
    InterruptedRunError,
    Memory,
    Model,
    Set,
    console,
    emit,
    load_run,
)

if TYPE_CHECKING:
    from halfbyte.compare import Comparison


def compare(
    model: Model = None,
    data: Annotated[Path | None, typer.Option("--data", help="Training samples, JSON lines.")] = None,
    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="Held-out samples.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder for the runs and the page.")] = None,
    variants: Annotated[
        str, typer.Option("--variants", metavar="A,B,...", help="What to compare; the first is what with.")
    ] = "16bit,nf4,fp4",
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="NAME[:KEY=VALUE,...]", help="Your own; NAME alone: as set. Repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each variant.")] = 3,
    minutes: Annotated[float, typer.Option("--minutes", min=0, help="Begin no run that would end later.")] = 60,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps of a run; 0: one pass over the data.")
    ] = None,
    config: Config = None,
    memory: Memory = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a model in several ways on the same data, and say which differences are real.

    Variants: full (all weights), 16bit (LoRA), nf4, nf4-single (scales in 32 bits), nf4-mse, nf4-signed,
    nf4-calibrated, nf4-start, fp4, int4, int4-asym, af4, bof4, bof4-s, int8, nf3, nf2. Each run is a process of its
    own; a finished one is not run again.
    """
    run = load_run(config, settings, {
        "--model": ("model.path", model), "--data": ("data.train", data), "--eval-data": ("data.eval", eval_data),
        "--output": ("train.output", output), "--steps": ("train.steps", steps), "--memory": ("memory.budget", memory),
    })  # fmt: skip
    from halfbyte.compare import compare as run_comparison
    from halfbyte.compare.variants import chosen

    wanted = chosen(variants, variant or ())
    out = console()
    folder = Path(run.train.output)
    with _saying_what_is_kept(folder):
        result = run_comparison(
            run, wanted, folder, seeds=seeds, minutes=minutes, say=lambda line: out.print(line, markup=False)
        )
    emit(result.to_dict(), as_json, _summary(result))


@contextmanager
def _saying_what_is_kept(folder: Path) -> Iterator[None]:
    """A signal ends the run in progress and then this: raises InterruptedRunError."""

    def stop(number: int, frame: object) -> None:
        kept = len(list((folder / "runs").glob("*.json")))
        raise InterruptedRunError(number, f"the same command keeps {kept} finished runs; one in progress begins anew")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(result: Comparison) -> str:
    """The rows for people."""
    from halfbyte.compare.page import interval, verdict
    from halfbyte.dtypes import format_bytes

    lines = [f"{'':<16} {'seeds':>5} {'before':>8} {'held-out loss':>18} {'base':>9} {'peak':>9} {'seconds':>8}"]
    for row in result.rows:
        if row.after is None:
            lines.append(f"{row.name:<16} did not run: {row.failed}")
            continue
        base = format_bytes(row.base_bytes) if row.base_bytes else ""
        lines.append(
            f"{row.name:<16} {len(row.seeds):>5} {row.before:>8.4f} {interval(row.after):>18} {base:>9} "
            f"{format_bytes(row.peak_memory or 0):>9} {row.seconds:>8.0f}"
        )
    lines += [f"{row.name}: {verdict(row, result.rows[0].name)}" for row in result.rows[1:] if row.after is not None]
    return "\n".join([*lines, f"page     {result.page}"])
