"""``halfbyte plan``: memory and time of a run before it starts; neither torch nor weights are needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.common import (
    AsJson,
    Config,
    Debug,
    Device,
    HostMemory,
    Memory,
    Model,
    Set,
    emit,
    known_machine,
    load_run,
)

if TYPE_CHECKING:
    from halfbyte.plan import Plan


def plan(
    model: Model = None,
    data: Annotated[Path | None, typer.Option("--data", help="As in train; it is not read.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="As in train; nothing is written.")] = None,
    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="As in train: evaluation is planned.")] = None,
    config: Config = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    device: Device = None,
    memory: Memory = None,
    host_memory: HostMemory = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw memory over a micro-batch, term by term, to this file.")
    ] = None,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Processes on one machine, under torchrun.")] = 1,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a run will need, phase by phase and term by term, whether it fits, and what would.

    MODEL may be a folder with no more than a config.json. Exit code 0 also where it does not fit: see "fits".
    """
    from halfbyte.config.target import check_parent
    from halfbyte.errors import ConfigError
    from halfbyte.plan import plan as make_plan

    run = load_run(config, settings, {
        "--model": ("model.path", model), "--data": ("data.train", data), "--eval-data": ("data.eval", eval_data),
        "--output": ("train.output", output), "--steps": ("train.steps", steps),
        "--device": ("model.device", device), "--memory": ("memory.budget", memory),
        "--host-memory": ("memory.host_budget", host_memory),
    })  # fmt: skip
    if not run.model.path:
        raise ConfigError("is not set", where="model.path", fix="Give --model")
    if picture is not None:
        check_parent(picture)
    machine = replace(known_machine(), ranks=ranks)
    made = make_plan(run, machine=machine)
    if picture is not None:
        from halfbyte.plan.picture import draw_plan

        draw_plan(run, made, machine, picture)
    emit(made.to_dict(), as_json, describe(made, run.train.steps))


def describe(made: Plan, steps: int) -> str:
    """The plan for people, of a run of `steps` steps; 0: not known."""
    from halfbyte.dtypes import format_bytes
    from halfbyte.plan.behind import disk_text
    from halfbyte.plan.time import time_text
    from halfbyte.report.run import TERMS

    lines = [
        f"{format_bytes(size):>10}  {TERMS.get(name, name.replace('_', ' '))}" for name, size in _sorted(made.terms)
    ]
    lines.append(f"{format_bytes(made.peak_memory):>10}  at most, in {made.fullest}")
    if made.ranks > 1:
        lines.append(f"{format_bytes(made.machine_peak):>10}  in all {made.ranks} ranks of the machine")
    lines.append("phases: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in made.phases.items()))
    lines.append("settings: " + ", ".join(f"{name} {value}" for name, value in made.choices.items()))
    lines += [f"changed to fit: {change}" for change in made.changes]
    if made.budget is not None:
        verdict = "fits" if made.fits else "does not fit"
        lines.append(f"{verdict} into {format_bytes(made.budget)} ({made.budget_source})")
    lines.append(f"smallest that would do, with every choice made for memory: {format_bytes(made.smallest_memory)}")
    if made.largest:
        lines.append("each alone could be " + ", ".join(f"{name} {value}" for name, value in made.largest.items()))
    merges = ", ".join(f"{name} {format_bytes(size)}" for name, size in made.merge_memory.items())
    lines.append(f"halfbyte merge afterwards, by format: {merges}")
    lines.append(disk_text(made.disk))
    lines.append(time_text(made.seconds_per_step, steps))
    return "\n".join([*lines, *(f"note: {note}" for note in made.notes)])


def _sorted(terms: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(terms.items(), key=lambda item: -item[1])
