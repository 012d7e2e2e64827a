"""``halfbyte init``: a TOML file that fits this machine, the model and the data, with the reason for each setting."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.common import (
    AsJson,
    Debug,
    Device,
    Memory,
    Model,
    Set,
    console,
    emit,
    known_machine,
    load_run,
    write_config,
)

if TYPE_CHECKING:
    from halfbyte.config import RunConfig
    from halfbyte.config.write import Setting
    from halfbyte.plan import Machine, Plan, Samples

MOST_READ = 16 * 2**20
"""Bytes of a data file that are read to measure it."""
SHARE = 0.8
"""Of the machine's RAM, where nothing else says what a run may take."""


def init(
    model: Model = None,
    data: Annotated[Path | None, typer.Option("--data", help="Training samples; measured, if given.")] = None,
    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="Held-out samples.")] = None,
    device: Device = None,
    memory: Memory = None,
    output: Annotated[Path, typer.Option("--output", help="The TOML file to write.")] = Path("run.toml"),
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Look at the machine, the model and the data, and write a TOML file that fits, with a reason for each setting.

    On a terminal it asks for what is not given. What --set says stays as it is. Go on with: halfbyte train --config.
    """
    from halfbyte.config.target import check_new
    from halfbyte.config.write import to_toml
    from halfbyte.errors import ConfigError

    check_new(output)
    if sys.stdin.isatty() and not as_json:
        model = model or typer.prompt("Base model (a folder, a .gguf file or a hub id)", err=True)
        if data is None:
            data = (
                Path(given)
                if (given := typer.prompt("Training data (JSON lines; empty: later)", "", err=True))
                else None
            )
    asked = load_run(None, settings, {
        "--model": ("model.path", model), "--data": ("data.train", data), "--eval-data": ("data.eval", eval_data),
        "--device": ("model.device", device), "--memory": ("memory.budget", memory),
    })  # fmt: skip
    if not asked.model.path:
        raise ConfigError("is not set", where="model.path", fix="Give --model")
    machine = known_machine()
    chosen, made, steps = _choose(asked, _given(asked, settings or ()), machine)
    names = list(load_order())
    ordered: dict[str, Setting] = dict(sorted(chosen.items(), key=lambda item: names.index(item[0])))
    command = f"halfbyte train --config {output}"
    verdict = _verdict(made, steps)
    write_config(output, to_toml(ordered, head=[f"By halfbyte init. {verdict}", f"Go on with: {command}"]))
    out = console()
    for name, setting in ordered.items():
        out.print(f"{name} = {setting.value}   {setting.why}", markup=False)
    result = {
        "output": str(output), "settings": {name: setting.value for name, setting in ordered.items()},
        "why": {name: setting.why for name, setting in ordered.items()}, "fits": made.fits,
        "peak_memory": made.peak_memory, "seconds_per_step": made.seconds_per_step,
    }  # fmt: skip
    emit(result, as_json, f"{verdict}\n{output} is written. Go on with: {command}")


def load_order() -> Sequence[str]:
    """Every "section.key", in the order of docs/config.md."""
    from dataclasses import fields

    from halfbyte.config.load import SECTIONS

    return [f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in fields(kind)]


def _given(asked: RunConfig, settings: Sequence[str]) -> dict[str, Setting]:
    """What the user said, which stays."""
    from halfbyte.config import to_dict
    from halfbyte.config.write import Setting

    plain = to_dict(asked)
    named = [setting.partition("=")[0].strip() for setting in settings]
    named += ["model.path", *(name for name in ("data.train", "data.eval", "memory.budget") if _value(plain, name))]
    named += ["model.device"] if asked.model.device != "auto" else []
    return {name: Setting(value=_value(plain, name), why="as you said") for name in named}


def _value(plain: dict[str, dict[str, Any]], name: str) -> Any:
    section, _, key = name.partition(".")
    return plain[section][key]


def _choose(asked: RunConfig, given: dict[str, Setting], machine: Machine) -> tuple[dict[str, Setting], Plan, int]:
    """The settings, their plan and their steps, with the longest sequences that fit.

    Raises:
        ResourceError: none does.
    """
    from halfbyte.config.write import Setting
    from halfbyte.dtypes import format_bytes
    from halfbyte.errors import ResourceError
    from halfbyte.plan import SHORTEST, compute_dtype, first_settings, plan, read_base, sequence_length, to_fit

    base = read_base(asked.model.path, asked.quant, compute_dtype(asked, machine))
    samples = _measure(asked) if asked.data.train else None
    around = {"train.output": Setting(value="run", why="adapter, log, curves and checkpoints")}
    if samples is not None:
        around["data.format"] = Setting(value=samples.format, why="what the first record is")
    if not asked.memory.budget and (budget := _budget(asked, machine)) is not None:
        around["memory.budget"] = budget
    length = given.get("data.max_seq_len") or sequence_length(base, samples)
    while True:
        first, steps = first_settings(base, length.value, samples, held_out=bool(asked.data.eval))
        settings = {**first, **around, "data.max_seq_len": length, **given}
        made = plan(_run(settings), machine=machine, base=base)
        if made.fits:
            return (
                settings | to_fit(made, settings),
                made,
                settings["train.steps"].value if "train.steps" in given else steps,
            )
        if length.value <= SHORTEST // 2 or "data.max_seq_len" in given:
            raise ResourceError(
                f"{format_bytes(made.smallest_memory)} are needed at least", where="memory.budget",
                why=f"{format_bytes(made.budget or 0)} are allowed", fix="Give --memory more, or take a smaller model",
            )  # fmt: skip
        length = Setting(value=length.value // 2, why=f"to fit; {length.value} would not")


def _run(settings: dict[str, Setting]) -> RunConfig:
    from halfbyte.config import load_config

    return load_config(None, (), **{name.replace(".", "__"): setting.value for name, setting in settings.items()})


def _budget(asked: RunConfig, machine: Machine) -> Setting | None:
    """What a run may take where the user does not say; None: a GPU or a container says it at any time."""
    from halfbyte.config.write import Setting
    from halfbyte.dtypes import format_bytes
    from halfbyte.plan import device_budget
    from halfbyte.plan.machine import physical_memory

    ram = physical_memory()
    if device_budget(asked, machine) is not None or ram is None:
        return None
    return Setting(
        value=f"{int(SHARE * ram) // 10**8 / 10:g}GB", why=f"{SHARE:.0%} of this machine's {format_bytes(ram)}"
    )


def _measure(asked: RunConfig) -> Samples:
    """Format and lengths of the training samples, of the first 16 MB of a large file."""
    from dataclasses import replace

    from halfbyte.data import load_data
    from halfbyte.model import load_tokenizer
    from halfbyte.plan import Samples

    path, scale = Path(asked.data.train), 1.0
    config = replace(asked.data, max_seq_len=2**31 - 1)
    tokenizer = load_tokenizer(asked.model.path)
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as part:
        if path.is_file() and (size := path.stat().st_size) > MOST_READ:
            with path.open("rb") as file:
                part.writelines(file.readlines(MOST_READ))
            part.flush()
            scale, path = size / part.tell(), Path(part.name)
        data = load_data(path, tokenizer, config)
    return Samples(path=asked.data.train, format=data.report.format, lengths=data.lengths.tolist(), scale=scale)


def _verdict(made: Plan, steps: int) -> str:
    from halfbyte.dtypes import format_bytes
    from halfbyte.plan import time_text

    room = f" of {format_bytes(made.budget)} ({made.budget_source})" if made.budget is not None else ""
    return f"Planned: {format_bytes(made.peak_memory)}{room}; {time_text(made.seconds_per_step, steps)}."
