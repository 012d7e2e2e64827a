"""``halfbyte train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.common import (
    AsJson,
    Config,
    Debug,
    HostMemory,
    Memory,
    Model,
    Set,
    calibration_file,
    console,
    emit,
    known_machine,
)

if TYPE_CHECKING:
    from halfbyte.train import TrainResult
    from halfbyte.train.answers import Answer


def train(
    model: Model = None,
    data: Annotated[Path | None, typer.Option("--data", help="Training samples, JSON lines.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder for the adapter, log and plots.")] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="Held-out samples; evaluated before and after.")
    ] = None,
    config: Config = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps; default: one pass over the data.")
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data, without --steps.")] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="auto|never|DIR", help="Go on from the newest checkpoint.")
    ] = None,
    memory: Memory = None,
    host_memory: HostMemory = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model: the base is quantized to 4 bits as it loads, and adapters train on top.

    The adapter lands in OUTPUT/adapter, where PEFT, halfbyte eval, generate and chat read it.
    """
    from halfbyte.config import load_config

    def text(path: Path | None) -> str | None:
        return None if path is None else str(path)

    run = load_config(
        config, settings or (), model__path=model, data__train=text(data), data__eval=text(eval_data),
        train__output=text(output), train__steps=steps, train__epochs=epochs, train__resume=resume,
        memory__budget=memory, memory__host_budget=host_memory,
    )  # fmt: skip
    from halfbyte.cli.progress import TrainProgress  # after the settings are known to be good: this loads torch
    from halfbyte.kernels import panel_rule
    from halfbyte.plan import compute_dtype, write_calibration
    from halfbyte.train import train as run_training

    with TrainProgress(console()) as progress:
        machine = known_machine()
        result = run_training(run, observer=progress, machine=machine)
    dtype = compute_dtype(run, machine)
    gflops = {dtype: result.gflops} if result.gflops else {}
    write_calibration(calibration_file(), runtime=result.runtime, gflops=gflops, panel_rows=panel_rule().rows)
    emit(result.to_dict(), as_json, summary(result))


def summary(result: TrainResult) -> str:
    """The result for people."""
    from halfbyte.dtypes import format_bytes

    lines = [
        f"{result.steps} steps in {result.seconds:,.0f} s, {result.tokens_per_s:,.0f} tokens/s "
        f"({result.supervised_tokens_per_s:,.0f} learned), peak memory {format_bytes(result.peak_memory)}",
        "training loss " + (f"{result.train_loss:.4f}" if result.train_loss is not None else "not known"),
    ]
    if result.eval_loss is not None and result.eval_loss_before is not None:
        change = result.eval_loss / result.eval_loss_before - 1
        lines.append(f"held-out loss {result.eval_loss_before:.4f} -> {result.eval_loss:.4f} ({change:+.1%})")
    lines = [*map(_answer_text, result.answers), *lines]
    return "\n".join([*lines, f"adapter  {result.adapter}", f"curves   {result.curves}"])


def _answer_text(answer: Answer) -> str:
    prompt = " ".join(answer.prompt.split())
    rows = {"expected": answer.expected, "before": answer.before, "after": answer.after}
    return "\n".join([prompt, *(f"  {name:<9} {' '.join(text.split())}" for name, text in rows.items()), ""])
