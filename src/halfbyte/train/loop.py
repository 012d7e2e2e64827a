"""The training loop: one function to be read from top to bottom."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

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
from halfbyte.config import LogConfig, RunConfig, hold_to, to_dict
from halfbyte.config.schema import require_config
from halfbyte.data import Batch, Cursor, make_batch
from halfbyte.dtypes import parse_bytes
from halfbyte.kernels.buffers import release_unused, steady_memory
from halfbyte.model.adapt import adapter_state, load_adapter_state
from halfbyte.optim import learning_rate
from halfbyte.plan import Machine, budget_of, this_machine
from halfbyte.train.evaluate import evaluate
from halfbyte.train.first_step import FirstStepCheck
from halfbyte.train.given import Samples, with_samples
from halfbyte.train.gpu import capped, in_use, where_to_compute
from halfbyte.train.guard import Guard
from halfbyte.train.metrics import Metrics
from halfbyte.train.observer import Observer, Observers, StepMetrics
from halfbyte.train.planning import as_of_ranks
from halfbyte.train.ranks import ALONE, Ranks, joined
from halfbyte.train.rehearsal import rehearse
from halfbyte.train.result import TrainResult, finish
from halfbyte.train.setup import Run, check_paths, prepare
from halfbyte.train.signals import Signals
from halfbyte.train.story import Story
from halfbyte.train.trace import MemoryTrace
from halfbyte.train.trackers import trackers
from halfbyte.train.watchdog import Watchdog

MIN_EVAL_TOKENS = 2048


def train(
    config: RunConfig, *, data: Samples | None = None, eval_data: Samples | None = None,
    observer: Observer | None = None, machine: Machine | None = None, ranks: Ranks = ALONE,
) -> TrainResult:  # fmt: skip
    """Fine-tune as `config` says; leaves an adapter folder that PEFT loads under ``train.output``.

    Args:
        data: samples in place of the file data.train, as a list of dicts or a `datasets.Dataset`; written into
            train.output as JSON lines first.
        eval_data: the same in place of data.eval.
        machine: what was measured of this machine, for the plan's time; default: nothing.
        ranks: this process among those that torchrun started; only rank 0 tells `observer`, and writes.

    Raises:
        HalfbyteError: what is wrong, and what to do about it; the last checkpoint stays good.
        TypeError: `config` is no RunConfig.
    """
    require_config(config)
    hold_to(config.limits)
    config = with_samples(config, data, eval_data, ranks)
    observer = observer if observer and ranks.leads else Observer()
    with joined(ranks), trackers(config.log if ranks.leads else LogConfig(), Path(config.train.output)) as tools:
        observer = Observers(observer, *tools)
        check_paths(config)
        config, machine, device = where_to_compute(config, machine or this_machine(), observer)
        budget = parse_bytes(config.memory.budget) if config.memory.budget else None
        host = budget_of(config, beside_gpu=device.type == "cuda")
        trace = MemoryTrace(device)
        story = Story(config, observer, trace, device)
        with (
            trace, steady_memory() as buffers, Watchdog(host, buffers, story) as watchdog,
            Signals(story, ranks) as signals,
            locked(Path(config.train.output)) if ranks.leads else nullcontext(), capped(device, budget),
        ):  # fmt: skip
            return _train(config, story, machine, device, watchdog, signals, ranks)


def _train(
    config: RunConfig, story: Story, machine: Machine, device: torch.device, watchdog: Watchdog, signals: Signals,
    ranks: Ranks,
) -> TrainResult:  # fmt: skip
    started = time.perf_counter()
    story.on_phase("prepare")
    run = story.run = prepare(config, story, machine, device, watchdog.start, ranks)
    config = run.config
    if run.loaded.store is not None and device.type == "cpu":
        watchdog.shrink = run.loaded.store.shrink
    output = Path(config.train.output)
    step, cursor = _resume_or_start(run, output, story)
    metrics = story.metrics = Metrics(output / "metrics.jsonl", first_step=step + 1, write=ranks.leads)
    max_eval_tokens = max(config.train.micro_batch_size * config.data.max_seq_len, MIN_EVAL_TOKENS)

    def evaluate_now(step: int) -> None:
        if run.eval_data is not None and step not in dict(metrics.evals):
            story.on_phase("evaluate")
            result = evaluate(run.model, run.objective, run.eval_data, max_tokens=max_eval_tokens,
                              on_progress=story.eval_progress, ranks=ranks)  # fmt: skip
            metrics.add_eval(step, result.loss)
            story.on_eval(step, result.loss)
            story.on_phase("train")

    with closing(metrics), run.objective.ready(), signals.finishing_steps():
        story.on_phase("train")
        largest = rehearse(run)
        signals.cut_short(partial(evaluate_now, step))
        run.model.train()
        check: FirstStepCheck | None = None
        guard = Guard(story, output)
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
            tokens, targets = ranks.total(sum(b.num_tokens for b in batches), sum(b.num_targets for b in batches))
            ranks.seed_step(config.train.seed, step)
            loss, grad_norm, lr = update(run, step, batches, targets, guard, check)
            if grad_norm is None:
                metrics.add_skipped(step)
            else:
                done = StepMetrics(
                    step=step, steps=run.steps, loss=loss, lr=lr, grad_norm=grad_norm,
                    tokens=int(tokens), supervised_tokens=int(targets),
                    seconds=time.perf_counter() - step_started, memory=in_use(device), epoch=epoch,
                )  # fmt: skip
                metrics.add_step(done)
                story.on_step(done)
            watchdog.check()
            signals.agree()
            last = step == run.steps
            if last or _due(step, config.train.eval_every):
                signals.cut_short(partial(evaluate_now, step))
            asked = signals.ending is not None or signals.saving
            if asked or (last and config.train.save_every) or _due(step, config.train.save_every):
                signals.saving = False
                metrics.sync()
                story.on_phase("save")
                moments = run.moments()
                if ranks.leads:
                    story.on_save(_save_checkpoint(run, output, step, cursor, moments))
                del moments
                story.on_phase("train")
    release_unused()  # what the steps took is not needed any more, and pictures and answers take some of their own
    story.on_phase("save")
    if ranks.leads:
        info = run.adapter_info()
        save_adapter(output / "adapter", adapter_state(run.model), run.peft_config, info, run.beside_adapter)
        story.on_save(output / "adapter")
    return finish(run, output, metrics, started, largest, guard.skipped, story)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def update(
    run: Run, step: int, batches: list[Batch], targets: float, guard: Guard, check: FirstStepCheck | None
) -> tuple[float, float | None, float]:
    """(loss, gradient norm or None where the update was left out, learning rate) of one optimizer step.

    Args:
        batches: this rank's.
        targets: supervised tokens of all ranks' batches.
    """
    loss = _accumulate_gradients(run, batches, targets)
    lr = _set_learning_rate(run, step)
    grad_norm = guard.gradient_norm(run.model, step, loss, run.config.optim.max_grad_norm)
    if check and grad_norm is not None:
        check.after_backward(step)
    if grad_norm is not None:
        run.optimizer.step()
        if run.owners:
            run.owners.share()
    run.model.zero_grad()
    if check and grad_norm is not None:
        check.after_update(step)
    return loss, grad_norm, lr


def _accumulate_gradients(run: Run, batches: list[Batch], targets: float) -> float:
    """Gradients of the step's loss: the sum over all its supervised tokens, divided by their number once.

    Streamed layers see all micro-batches before the next layer is read: the same sums in the same order.
    """
    total = 0.0
    # Of an epoch's last ones a rank may have none; but it takes its part in gathering layers.
    counted = [batch for batch in batches if batch.num_tokens]
    idle = [] if counted or not run.owners else [make_batch(run.data, [0])]
    for together in [[batch] for batch in counted] if run.loaded.store is None else [counted or idle]:
        losses = [loss / targets * (not idle) for loss in run.objective.loss_sums(together)]
        torch.autograd.backward(losses)
        total += sum(float(loss.detach()) for loss in losses)
    run.ranks.sum_gradients(run.model.parameters())
    (total,) = run.ranks.total(total)
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
    config = to_dict(run.config)
    changes = compare_config(
        as_of_ranks(saved.config, saved.environment, config, run.ranks), config, saved_hashes=saved.hashes,
        current_hashes=run.hashes,
    )  # fmt: skip
    load_adapter_state(run.model, saved.adapter)
    run.load_moments(saved.optimizer)
    restore_rng(saved.rng)
    changed = "".join(f"; changed: {change}" for change in changes)
    observer.note(f"resumed from {path} after step {saved.step}{changed}")
    for change in environment_changes(saved, run.ranks.world):
        observer.note(f"not bit-exact with the first part of the run: {change}")
    return saved.step, Cursor(**saved.cursor)


def _save_checkpoint(run: Run, output: Path, step: int, cursor: Cursor, moments: dict[str, Any]) -> Path:
    path = save_checkpoint(
        output, step, adapter=adapter_state(run.model), adapter_config=run.peft_config, info=run.adapter_info(),
        optimizer=moments, rng=capture_rng(), cursor=asdict(cursor),
        config=to_dict(run.config), hashes=run.hashes, ranks=run.ranks.world, beside=run.beside_adapter,
    )  # fmt: skip
    prune_checkpoints(output, run.config.train.keep, step=step)
    return path
