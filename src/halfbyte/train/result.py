"""What a run came to: its figures, pictures and answers, and the page with all of them."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import write_file
from halfbyte.dtypes import format_bytes
from halfbyte.report import Answer, run_page
from halfbyte.train.answers import answer_samples
from halfbyte.train.gpu import peaks
from halfbyte.train.metrics import Metrics
from halfbyte.train.picture import draw_curves
from halfbyte.train.setup import Run
from halfbyte.train.story import Story

TELLING_TOKENS, TELLING_OPERATIONS = 512, 1e11
"""Of a step, from which on its speed says something of larger ones and of larger models: in less work the products do
not set the pace."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to; losses are per supervised token, sizes in bytes, None where not measured."""

    steps: int
    """Of the whole run."""
    steps_now: int
    """Of these, what this process did: all, unless it went on from a checkpoint."""
    train_loss: float | None
    """Over the last tenth of the steps."""
    eval_loss_before: float | None
    eval_loss: float | None
    tokens_per_s: float
    supervised_tokens_per_s: float
    skipped_steps: int
    """Of this process, whose update was not finite and was left out."""
    seconds: float
    """Of this process, loading and evaluation included."""
    device: str
    """Whose memory these are of: cpu or cuda."""
    peak_memory: int
    taken_memory: int
    """Most that was taken from the system: on a GPU the allocator takes more than is used at once."""
    predicted_peak_memory: int
    """By the plan that was made before the base was loaded."""
    runtime: int | None
    """Of the prediction, Python and the libraries: for later plans; None on a GPU."""
    gflops: float | None
    """Floating-point operations of the first forward and backward pass, 1e9 a second: for later plans of time."""
    adapter: str
    curves: str
    report: str
    """The page with all of it."""
    answers: list[Answer]
    """A few held-out prompts before and after; empty without data.eval."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def finish(
    run: Run, output: Path, metrics: Metrics, started: float, largest: int, skipped: int, story: Story
) -> TrainResult:
    """Answers, curves, result.json and report.html, when the adapter is on disk.

    Args:
        started: `time.perf_counter()` at the beginning of the run.
        largest: tokens of the batch that was planned for.
        skipped: updates that were left out.
    """
    story.on_phase("generate")
    tokens_per_s, supervised_tokens_per_s = metrics.rates()
    answers: list[Answer] = []
    if run.loaded.store is not None:
        story.note("answers: none are sampled, because each of their tokens would fetch the whole base")
    elif run.eval_data is not None and run.ranks.leads:
        answers = answer_samples(run.model, run.tokenizer, run.eval_data, run.config.data)
    if metrics.steps and run.ranks.leads:
        draw_curves(metrics, output / "curves.png", f"{Path(run.config.model.path).name}: {run.steps} steps")
    (peak, taken), planned = peaks(run.device), run.plan.peak_memory
    story.note(
        f"memory: {format_bytes(peak)} at most{f' in use, {format_bytes(taken)} taken' if taken > peak else ''}; "
        f"planned were {format_bytes(planned)}, "
        f"{abs(planned / taken - 1):.1%} {'more' if planned >= taken else 'LESS than was needed'}"
    )
    result = TrainResult(
        steps=run.steps,
        steps_now=metrics.steps_now,
        train_loss=metrics.train_loss(),
        eval_loss_before=dict(metrics.evals).get(0),
        eval_loss=dict(metrics.evals).get(run.steps),
        tokens_per_s=tokens_per_s,
        supervised_tokens_per_s=supervised_tokens_per_s,
        skipped_steps=skipped,
        seconds=time.perf_counter() - started,
        device=run.device.type,
        peak_memory=peak,
        taken_memory=taken,
        predicted_peak_memory=planned,
        runtime=run.libraries,
        gflops=_gflops(run, metrics, largest),
        adapter=str(output / "adapter"),
        curves=str(output / "curves.png"),
        report=str(output / "report.html"),
        answers=answers,
    )
    story.answers, story.state = answers, "finished"
    if run.ranks.leads:
        write_file(output / "result.json", json.dumps(result.to_dict(), indent=1).encode())
        write_file(output / "report.html", run_page(story.report()).encode())
    return result


def _gflops(run: Run, metrics: Metrics, largest: int) -> float | None:
    """Floating-point operations of the fastest step, 1e9 a second, `largest` being the tokens of the batch that was
    planned for. None where all steps were small, or the disk may have set their pace."""
    memory, operations = run.config.memory, run.plan.pass_operations / largest
    rate = metrics.best_rate(least=max(TELLING_TOKENS, TELLING_OPERATIONS / operations))
    if rate is None or run.ranks.world > 1:
        return None
    if memory.weights != "resident" or memory.activations == "disk" or run.config.optim.paged:
        return None
    return rate * operations / 1e9
