"""The training loop: one function to be read from top to bottom."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from halfbyte.checkpoint import (
    capture_rng,
    compare_config,
    environment_changes,
    load_checkpoint,
    locked,
    prune_checkpoints,
    restore_rng,
    save_adapter,
    save_checkpoint,
)
from halfbyte.config import RunConfig, hold_to, to_dict
from halfbyte.config.schema import require_config
from halfbyte.data import Batch, Cursor
from halfbyte.dtypes import parse_bytes
from halfbyte.kernels.buffers import release_unused, steady_memory
from halfbyte.model.adapt import adapter_state, load_adapter_state
from halfbyte.optim import learning_rate
from halfbyte.plan import Machine, budget_of, this_machine
from halfbyte.train.evaluate import evaluate
from halfbyte.train.first_step import FirstStepCheck
from halfbyte.train.gpu import capped, in_use, where_to_compute
from halfbyte.train.guard import Guard
from halfbyte.train.metrics import Metrics
from halfbyte.train.observer import Observer, StepMetrics
from halfbyte.train.rehearsal import rehearse
from halfbyte.train.result import TrainResult, finish
from halfbyte.train.setup import Run, check_paths, prepare
from halfbyte.train.signals import Signals
from halfbyte.train.watchdog import Watchdog

MIN_EVAL_TOKENS = 2048


def train(config: RunConfig, *, observer: Observer | None = None, machine: Machine | None = None) -> TrainResult:
    """Fine-tune as `config` says; leaves an adapter folder that PEFT loads under ``train.output``.

    Args:
        machine: what was measured of this machine, for the plan's time; default: nothing.

    Raises:
        HalfbyteError: what is wrong, and what to do about it; the last checkpoint stays good.
        TypeError: `config` is no RunConfig.
    """
    require_config(config)
    hold_to(config.limits)
    check_paths(config)
    observer = observer or Observer()
    config, machine, device = where_to_compute(config, machine or this_machine(), observer)
    budget = parse_bytes(config.memory.budget) if config.memory.budget else None
    host = budget_of(config, beside_gpu=device.type == "cuda")
    with (
        steady_memory() as buffers, Watchdog(host, buffers, observer) as watchdog, Signals(observer) as signals,
        locked(Path(config.train.output)), capped(device, budget),
    ):  # fmt: skip
        return _train(config, observer, machine, device, watchdog, signals)


def _train(
    config: RunConfig, observer: Observer, machine: Machine, device: torch.device, watchdog: Watchdog, signals: Signals
) -> TrainResult:
    started = time.perf_counter()
    run = prepare(config, observer, machine, device, watchdog.start)
    config = run.config
    if run.loaded.store is not None and device.type == "cpu":
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

    with closing(metrics), run.objective.ready(), signals.finishing_steps():
        largest = rehearse(run)
        signals.cut_short(partial(evaluate_now, step))
        run.model.train()
        check: FirstStepCheck | None = None
        guard = Guard(observer, output)
        while step < run.steps and signals.ending is None:
            step += 1
            step_started = time.perf_counter()
            epoch = cursor.epoch
            batches: list[Batch] = []
            for _ in range(config.train.gradient_accumulation_steps):
                batch, cursor = run.loader.next_batch(cursor)
                batches.append(batch)
            if step == 1:
                check = FirstStepCheck(run.model, run.objective, batches[0])
            loss, grad_norm, lr = update(run, step, batches, guard, check)
            if grad_norm is None:
                metrics.add_skipped(step)
            else:
                done = StepMetrics(
                    step=step, steps=run.steps, loss=loss, lr=lr, grad_norm=grad_norm,
                    tokens=sum(b.num_tokens for b in batches), supervised_tokens=sum(b.num_targets for b in batches),
                    seconds=time.perf_counter() - step_started, memory=in_use(device), epoch=epoch,
                )  # fmt: skip
                metrics.add_step(done)
                observer.on_step(done)
            watchdog.check()
            last = step == run.steps
            if last or _due(step, config.train.eval_every):
                signals.cut_short(partial(evaluate_now, step))
            asked = signals.ending is not None or signals.saving
            if asked or (last and config.train.save_every) or _due(step, config.train.save_every):
                signals.saving = False
                metrics.sync()
                observer.on_save(_save_checkpoint(run, output, step, cursor))
    release_unused()  # what the steps took is not needed any more, and pictures and answers take some of their own
    save_adapter(output / "adapter", adapter_state(run.model), run.peft_config, run.adapter_info())
    observer.on_save(output / "adapter")
    return finish(run, output, metrics, started, largest, guard.skipped, observer)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def update(
    run: Run, step: int, batches: list[Batch], guard: Guard, check: FirstStepCheck | None
) -> tuple[float, float | None, float]:
    """(loss, gradient norm or None where the update was left out, learning rate) of one optimizer step."""
    loss = _accumulate_gradients(run, batches)
    lr = _set_learning_rate(run, step)
    grad_norm = guard.gradient_norm(run.model, step, loss, run.config.optim.max_grad_norm)
    if check and grad_norm is not None:
        check.after_backward(step)
    if grad_norm is not None:
        run.optimizer.step()
    run.optimizer.zero_grad()
    if check and grad_norm is not None:
        check.after_update(step)
    return loss, grad_norm, lr


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
