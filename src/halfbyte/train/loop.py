"""The training loop: one function to be read from top to bottom."""

from __future__ import annotations

import json
import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint import (
    capture_rng,
    compare_config,
    environment_changes,
    load_checkpoint,
    prune_checkpoints,
    restore_rng,
    save_adapter,
    save_checkpoint,
    write_file,
)
from halfbyte.config import RunConfig, to_dict
from halfbyte.config.schema import require_config
from halfbyte.data import Batch, Cursor
from halfbyte.dtypes import format_bytes
from halfbyte.errors import NumericsError
from halfbyte.kernels.buffers import release_unused, steady_memory
from halfbyte.model.adapt import adapter_state, load_adapter_state
from halfbyte.model.memory import peak_memory, resident_memory
from halfbyte.optim import clip_grad_norm, learning_rate
from halfbyte.plan import Machine, budget_of
from halfbyte.train.answers import Answer, answer_samples, page
from halfbyte.train.evaluate import evaluate
from halfbyte.train.first_step import FirstStepCheck
from halfbyte.train.metrics import Metrics
from halfbyte.train.observer import Observer, StepMetrics
from halfbyte.train.picture import draw_curves
from halfbyte.train.rehearsal import rehearse
from halfbyte.train.setup import Run, prepare
from halfbyte.train.watchdog import Watchdog

MIN_EVAL_TOKENS = 2048
TELLING_TOKENS = 512
"""Of a step, from which on its speed says something of larger ones."""


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
    seconds: float
    """Of this process, loading and evaluation included."""
    peak_memory: int
    predicted_peak_memory: int
    """By the plan that was made before the base was loaded."""
    runtime: int
    """Of the prediction, Python and the libraries: for later plans."""
    gflops: float | None
    """Floating-point operations of the first forward and backward pass, 1e9 a second: for later plans of time."""
    adapter: str
    curves: str
    answers: list[Answer]
    """A few held-out prompts before and after; empty without data.eval."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def train(config: RunConfig, *, observer: Observer | None = None, machine: Machine | None = None) -> TrainResult:
    """Fine-tune as `config` says; leaves an adapter folder that PEFT loads under ``train.output``.

    Args:
        machine: what was measured of this machine, for the plan's time; default: nothing.

    Raises:
        HalfbyteError: what is wrong, and what to do about it; the last checkpoint stays good.
        TypeError: `config` is no RunConfig.
    """
    require_config(config)
    observer = observer or Observer()
    with steady_memory() as buffers, Watchdog(budget_of(config), buffers, observer) as watchdog:
        return _train(config, observer, machine, watchdog)


def _train(config: RunConfig, observer: Observer, machine: Machine | None, watchdog: Watchdog) -> TrainResult:
    started = time.perf_counter()
    run = prepare(config, observer, machine, watchdog.start)
    config = run.config
    if run.loaded.store is not None:
        watchdog.shrink = run.loaded.store.shrink
    output = Path(config.train.output)
    step, cursor = _resume_or_start(run, output, observer)
    metrics = Metrics(output / "metrics.jsonl", first_step=step + 1)
    max_eval_tokens = max(config.train.micro_batch_size * config.data.max_seq_len, MIN_EVAL_TOKENS)

    def evaluate_now(step: int) -> None:
        if run.eval_data is not None and step not in dict(metrics.evals):
            result = evaluate(run.model, run.objective, run.eval_data, max_tokens=max_eval_tokens,
                              on_progress=observer.eval_progress)  # fmt: skip
            metrics.add_eval(step, result.loss)
            observer.on_eval(step, result.loss)

    with closing(metrics), run.objective.ready():
        largest = rehearse(run)
        evaluate_now(step)
        run.model.train()
        check: FirstStepCheck | None = None
        while step < run.steps:
            step += 1
            step_started = time.perf_counter()
            epoch = cursor.epoch
            batches: list[Batch] = []
            for _ in range(config.train.gradient_accumulation_steps):
                batch, cursor = run.loader.next_batch(cursor)
                batches.append(batch)
            if step == 1:
                check = FirstStepCheck(run.model, run.objective, batches[0])
            loss = _accumulate_gradients(run, batches)
            if check:
                check.after_backward(step)
            if not math.isfinite(loss):
                raise NumericsError(
                    f"the loss is {loss}", where=f"step {step}",
                    fix="Lower optim.lr; the checkpoints before this step are good",
                )  # fmt: skip
            grad_norm = clip_grad_norm(run.model.parameters(), config.optim.max_grad_norm)
            lr = _set_learning_rate(run, step)
            run.optimizer.step()
            run.optimizer.zero_grad()
            if check:
                check.after_update(step)
            done = StepMetrics(
                step=step, steps=run.steps, loss=loss, lr=lr, grad_norm=grad_norm,
                tokens=sum(b.num_tokens for b in batches), supervised_tokens=sum(b.num_targets for b in batches),
                seconds=time.perf_counter() - step_started, memory=resident_memory(), epoch=epoch,
            )  # fmt: skip
            metrics.add_step(done)
            observer.on_step(done)
            watchdog.check()
            last = step == run.steps
            if last or (config.train.eval_every and step % config.train.eval_every == 0):
                evaluate_now(step)
            if config.train.save_every and (last or step % config.train.save_every == 0):
                observer.on_save(_save_checkpoint(run, output, step, cursor))
    release_unused()  # what the steps took is not needed any more, and pictures and answers take some of their own
    save_adapter(output / "adapter", adapter_state(run.model), run.peft_config, run.adapter_info())
    observer.on_save(output / "adapter")
    return _finish(run, output, metrics, started, largest, observer)


def _accumulate_gradients(run: Run, batches: list[Batch]) -> float:
    """Gradients of the step's loss: the sum over all its supervised tokens, divided by their number once.

    Streamed layers see all micro-batches before the next layer is read: the same sums in the same order.
    """
    targets = sum(batch.num_targets for batch in batches)
    total = 0.0
    for together in [[batch] for batch in batches] if run.loaded.store is None else [batches]:
        losses = [loss / targets for loss in run.objective.loss_sums(together)]
        torch.autograd.backward(losses)
        total += sum(float(loss.detach()) for loss in losses)
    return total


def _set_learning_rate(run: Run, step: int) -> float:
    optim = run.config.optim
    lr = learning_rate(step, lr=optim.lr, schedule=optim.schedule, warmup_steps=optim.warmup_steps, steps=run.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    return lr


def _resume_or_start(run: Run, output: Path, observer: Observer) -> tuple[int, Cursor]:
    """(steps done, next batch): those of a checkpoint that is found and fits, else of a fresh start."""
    resume, path = run.config.train.resume, run.checkpoint
    if path is None:
        observer.note(f"fresh start: {'train.resume is never' if resume == 'never' else f'no checkpoint in {output}'}")
        return 0, run.loader.start()
    saved = load_checkpoint(path)
    changes = compare_config(saved.config, to_dict(run.config), saved_hashes=saved.hashes, current_hashes=run.hashes)
    load_adapter_state(run.model, saved.adapter)
    run.optimizer.load_state_dict(saved.optimizer)
    restore_rng(saved.rng)
    changed = "".join(f"; changed: {change}" for change in changes)
    observer.note(f"resumed from {path} after step {saved.step}{changed}")
    for change in environment_changes(saved):
        observer.note(f"not bit-exact with the first part of the run: {change}")
    return saved.step, Cursor(**saved.cursor)


def _save_checkpoint(run: Run, output: Path, step: int, cursor: Cursor) -> Path:
    path = save_checkpoint(
        output, step, adapter=adapter_state(run.model), adapter_config=run.peft_config, info=run.adapter_info(),
        optimizer=run.optimizer.streamed_state_dict(), rng=capture_rng(), cursor=asdict(cursor),
        config=to_dict(run.config), hashes=run.hashes,
    )  # fmt: skip
    prune_checkpoints(output, run.config.train.keep, step=step)
    return path


def _gflops(run: Run, metrics: Metrics, largest: int) -> float | None:
    """Floating-point operations of the fastest step, 1e9 a second, `largest` being the tokens of the batch that was
    planned for. None where all steps were small, or the disk may have set their pace."""
    memory = run.config.memory
    rate = metrics.best_rate(least=TELLING_TOKENS)
    if rate is None or memory.weights != "resident" or memory.activations == "disk" or run.config.optim.paged:
        return None
    return rate * run.plan.pass_operations / largest / 1e9


def _finish(run: Run, output: Path, metrics: Metrics, started: float, largest: int, observer: Observer) -> TrainResult:
    tokens_per_s, supervised_tokens_per_s = metrics.rates()
    answers: list[Answer] = []
    if run.loaded.store is not None:
        observer.note("answers: none are sampled, because each of their tokens would read the streamed base")
    elif run.eval_data is not None:
        answers = answer_samples(run.model, run.tokenizer, run.eval_data, run.config.data)
    if answers:
        write_file(output / "answers.md", page(answers).encode())
    if metrics.steps:
        draw_curves(metrics, output / "curves.png", f"{Path(run.config.model.path).name}: {run.steps} steps")
    peak, planned = peak_memory(), run.plan.peak_memory
    observer.note(
        f"memory: {format_bytes(peak)} at most; planned were {format_bytes(planned)}, "
        f"{abs(planned / peak - 1):.1%} {'more' if planned >= peak else 'LESS than was needed'}"
    )
    result = TrainResult(
        steps=run.steps,
        steps_now=metrics.steps_now,
        train_loss=metrics.train_loss(),
        eval_loss_before=dict(metrics.evals).get(0),
        eval_loss=dict(metrics.evals).get(run.steps),
        tokens_per_s=tokens_per_s,
        supervised_tokens_per_s=supervised_tokens_per_s,
        seconds=time.perf_counter() - started,
        peak_memory=peak,
        predicted_peak_memory=planned,
        runtime=run.libraries,
        gflops=_gflops(run, metrics, largest),
        adapter=str(output / "adapter"),
        curves=str(output / "curves.png"),
        answers=answers,
    )
    write_file(output / "result.json", json.dumps(result.to_dict(), indent=1).encode())
    return result
