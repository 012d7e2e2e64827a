"""``halfbyte train``."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.common import (
    AsJson,
    Config,
    Debug,
    Device,
    HostMemory,
    InterruptedRunError,
    Memory,
    Model,
    Set,
    calibration_file,
    console,
    emit,
    known_machine,
    load_run,
    saying_what_is_kept,
)
from halfbyte.cli.ranks import one_voice, ranks_of, share_threads
from halfbyte.errors import ConfigError, HalfbyteError

if TYPE_CHECKING:
    from halfbyte.report import Answer
    from halfbyte.train import TrainResult


PATIENCE = 20.0
"""Seconds in which torchrun ends the ranks when the first one has refused a run."""


def train(
    model: Model = None,
    data: Annotated[Path | None, typer.Option("--data", help="Training samples, JSON lines or .parquet.")] = None,
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
    device: Device = None,
    memory: Memory = None,
    host_memory: HostMemory = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="A page of the run while it goes on, on this machine alone.")
    ] = False,
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Of --dashboard; 0: free.")] = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model: the base is quantized as it loads (quant.quant_type), and adapters train on top.

    The adapter lands in OUTPUT/adapter, where PEFT, halfbyte eval, generate and chat read it.
    """

    from halfbyte.plan import check_run

    share_threads(os.environ)
    with one_voice(os.environ, HalfbyteError, patience=PATIENCE):
        _check_port(port, dashboard)
        run = load_run(config, settings, {
            "--model": ("model.path", model), "--data": ("data.train", data), "--eval-data": ("data.eval", eval_data),
            "--output": ("train.output", output), "--steps": ("train.steps", steps),
            "--epochs": ("train.epochs", epochs), "--resume": ("train.resume", resume),
            "--device": ("model.device", device), "--memory": ("memory.budget", memory),
            "--host-memory": ("memory.host_budget", host_memory),
        })  # fmt: skip
        check_run(run)
    from halfbyte.cli.watching import watched  # after the settings are known to be good: this loads torch
    from halfbyte.kernels import panel_rule
    from halfbyte.plan import speed_key, write_calibration
    from halfbyte.train import train as run_training

    ranks = ranks_of(os.environ)
    watching = watched(run, console(), port=(port or 0) if dashboard else None) if ranks.leads else nullcontext()
    with one_voice(os.environ, InterruptedRunError), saying_what_is_kept(run), watching as observer:
        machine = known_machine()
        result = run_training(run, observer=observer, machine=machine, ranks=ranks)
    if not ranks.leads:
        return
    gflops = {speed_key(run, machine): result.gflops} if result.gflops else {}
    write_calibration(calibration_file(), runtime=result.runtime, gflops=gflops, panel_rows=panel_rule().rows)
    emit(result.to_dict(), as_json, summary(result))


def _check_port(port: int | None, dashboard: bool) -> None:
    if port is not None and not dashboard:
        raise ConfigError("is a port of --dashboard, which was not given", where="--port", fix="Give --dashboard, too")


def summary(result: TrainResult) -> str:
    """The result for people."""
    from halfbyte.dtypes import format_bytes

    in_all = f" ({result.steps} in all)" if result.steps_now != result.steps else ""
    lines = [
        f"{result.steps_now} steps{in_all} in {result.seconds:,.0f} s, {result.tokens_per_s:,.0f} tokens/s "
        f"({result.supervised_tokens_per_s:,.0f} learned), peak memory {format_bytes(result.peak_memory)}",
        _loss_text(result),
    ]
    if result.eval_loss is not None and result.eval_loss_before is not None:
        change = result.eval_loss / result.eval_loss_before - 1
        lines.append(f"held-out loss {result.eval_loss_before:.4f} -> {result.eval_loss:.4f} ({change:+.1%})")
    lines = [*map(_answer_text, result.answers), *lines]
    return "\n".join([*lines, f"adapter  {result.adapter}", f"report   {result.report}"])


def _loss_text(result: TrainResult) -> str:
    """Says which mean it is: the progress shows another one."""
    if result.train_loss is None:
        return "training loss not known"
    last = max(result.steps // 10, 1)
    steps = "the last step" if last == 1 else f"the last {last} steps"
    smoothed = "while it goes on, smoothed: 0.9 of what was shown before and 0.1 of the step's"
    return f"training loss {result.train_loss:.4f}, the mean of {steps} ({smoothed})"


def _answer_text(answer: Answer) -> str:
    prompt = " ".join(answer.prompt.split())
    rows = {"expected": answer.expected, "before": answer.before, "after": answer.after}
    return "\n".join([prompt, *(f"  {name:<9} {' '.join(text.split())}" for name, text in rows.items()), ""])
