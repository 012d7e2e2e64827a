"""An adapter's start trained towards the 16-bit model's own predictions, before any label is learned.

The closed form (calibrate/start.py) makes up for each layer by itself, for the squares of its outputs. What counts is
what the model predicts, so a few steps follow on that: KL(16 bits || 4 bits and start) at the tokens to be learned.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint import load_adapter
from halfbyte.checkpoint.adapter import write_adapter
from halfbyte.checkpoint.durable import FolderWriter
from halfbyte.config import OptimConfig, RunConfig, TrainConfig
from halfbyte.data import Batch, join_batches, load_data, to_padded
from halfbyte.dtypes import format_bytes
from halfbyte.errors import ResourceError
from halfbyte.kernels.buffers import steady_memory
from halfbyte.model.adapt import adapter_state
from halfbyte.model.lent import LentModel
from halfbyte.model.names import match_names
from halfbyte.model.read import read_unquantized
from halfbyte.model.source import load_tokenizer, open_source
from halfbyte.nn import IGNORE_INDEX
from halfbyte.plan.start import START
from halfbyte.train.guard import Guard
from halfbyte.train.loop import update
from halfbyte.train.observer import Observer
from halfbyte.train.setup import Run, prepare

BATCH, RATE, WARMUP = 8, 1e-4, 6
"""Samples in a step, the highest learning rate and the steps that it takes to get there."""
TEXT, TOKENS = 65_536, 4096
"""Tokens of text in all, about (longer samples make smaller steps), and at a time through the 16-bit model."""
REPORT_EVERY = 20
"""Steps."""


def match_start(config: RunConfig, base: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Train the start in `base`, a 4-bit folder that is still being written, for `config.lora.match_steps` steps on
    `config.quant.calibrate`, so that both predict what `config.model.path`, of which they were made, predicts.

    Returns:
        steps, tokens learned, seconds, the bytes that were planned for, and the KL divergence by token, in nats: means
        over the first and the last quarter of the steps.

    Raises:
        ResourceError: it needs more than memory.budget; the start is as it was.
        ConfigError: the architecture changes logits after its output layer; likewise.
        NumericsError: losses or gradients are not finite; likewise.
    """
    started = time.perf_counter()
    with steady_memory():
        run = prepare(_settings(config, base), Observer())
        steps = _steps(run)
        run = replace(run, steps=len(steps))
        planned = run.plan.peak_memory + sum(_state_bytes(run, batches) for batches in steps)
        say(f"start: {run.steps} steps towards the 16-bit model; about {format_bytes(planned)} at the fullest moment")
        tokens = _label(run, config.model.path, [batch for batches in steps for batch in batches])
        guard = Guard(Observer(), base)
        losses: list[float] = []
        with run.objective.ready():
            run.model.train()
            for step, batches in enumerate(steps, 1):
                targets = sum(batch.num_targets for batch in batches)
                losses.append(update(run, step, batches, targets, guard, None)[0])
                if step % REPORT_EVERY == 0:
                    mean, spent = fmean(losses[-REPORT_EVERY:]), time.perf_counter() - started
                    say(f"start: step {step} of {run.steps}, KL {mean:.4f}, {spent:.0f} s")
    part = -(-len(losses) // 4)
    matched = {
        "steps": run.steps, "tokens": tokens, "kl_first": fmean(losses[:part]), "kl_last": fmean(losses[-part:]),
        "seconds": time.perf_counter() - started, "planned_memory": planned,
    }  # fmt: skip
    start = load_adapter(base / START)
    shutil.rmtree(start.folder)
    start.folder.mkdir()
    info = {**start.info, "matched": {key: matched[key] for key in ("steps", "tokens")}}
    write_adapter(FolderWriter(start.folder), adapter_state(run.model), start.config, info)
    return matched


def _settings(config: RunConfig, base: Path) -> RunConfig:
    """Of a run on the CPU, where the 16-bit model is, that begins at the start and learns all of it alike."""
    steps, text = config.lora.match_steps, config.quant.calibrate
    length = load_data(text, load_tokenizer(config.model.path), config.data).lengths.mean()
    samples = max(min(BATCH, int(TEXT / steps / length)), 1)
    return replace(
        config, model=replace(config.model, path=str(base), device="cpu"), quant=replace(config.quant, calibrate=""),
        lora=replace(config.lora, dropout=0.0, trainable_tokens=(), modules_to_save=()),
        data=replace(config.data, train=text, eval="", packing=False),
        optim=OptimConfig(lr=RATE, schedule="linear", warmup_steps=min(WARMUP, steps // 2)),
        train=TrainConfig(output=str(base), steps=steps, resume="never", micro_batch_size=samples),
    )  # fmt: skip


def _steps(run: Run) -> list[list[Batch]]:
    """The micro-batches of every step; fewer steps where the 16-bit model's states leave the budget no room."""
    room = None if run.plan.budget is None else run.plan.budget - run.plan.peak_memory
    cursor, steps, states = run.loader.start(), list[list[Batch]](), 0
    for _ in range(run.steps):
        batches = []
        for _ in range(run.config.train.gradient_accumulation_steps):
            batch, cursor = run.loader.next_batch(cursor)
            batches.append(batch)
        states += _state_bytes(run, batches)
        if room is not None and states > room:
            break
        steps.append(batches)
    if not steps:
        raise ResourceError(
            "leaves no room to match the start to the 16-bit model", where="memory.budget",
            why=f"a step takes {format_bytes(states)} beside {format_bytes(run.plan.peak_memory)}",
            fix="Raise it, or give --set lora.match_steps=0",
        )  # fmt: skip
    return steps


def _state_bytes(run: Run, batches: list[Batch]) -> int:
    """Of the 16-bit model's last hidden states at the tokens that `batches` learn."""
    return 4 * int(run.loaded.model.config.get_text_config().hidden_size) * sum(batch.num_targets for batch in batches)


@torch.no_grad()
def _label(run: Run, path: str, batches: list[Batch]) -> int:
    """Have `run` match the last hidden states that the model `path` has on `batches`; returns how many."""
    source = open_source(path)
    model = LentModel(source)
    reader = source.open_tensors()
    names = match_names(model.model, reader, path)
    states: list[Tensor] = []
    count = 0
    with model.lend(lambda name: read_unquantized(reader, names[name], model.model.get_parameter(name), path)):
        for some in _together(batches):
            padded = to_padded(join_batches(some)[0])
            states.append(model.run(padded.input_ids)[:, :-1][padded.labels[:, 1:] != IGNORE_INDEX])
    for batch in batches:
        learned = batch.labels != IGNORE_INDEX
        batch.labels[learned] = torch.arange(count, count + batch.num_targets)
        count += batch.num_targets
    run.objective.match(torch.cat(states))
    return count


def _together(batches: list[Batch]) -> Iterator[list[Batch]]:
    """Batches of TOKENS tokens, or one that has more."""
    some: list[Batch] = []
    for batch in batches:
        if some and sum(b.num_tokens for b in (*some, batch)) > TOKENS:
            yield some
            some = []
        some.append(batch)
    yield some
