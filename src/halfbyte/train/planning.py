"""The plan of a run whose data is known: made before the base is loaded, said, and kept to."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint import checkpoint_origin
from halfbyte.checkpoint.adapter import INFO
from halfbyte.checkpoint.disk import check_space, disk_errors
from halfbyte.checkpoint.manifest import read_json
from halfbyte.config import RunConfig
from halfbyte.data import BatchLoader, TokenizedData, Worst, compact
from halfbyte.dtypes import format_bytes
from halfbyte.errors import ResourceError
from halfbyte.kernels import keep_to, panel_rule
from halfbyte.model.memory import resident_memory
from halfbyte.plan import (
    SCRATCH,
    Base,
    Machine,
    Plan,
    Work,
    apply_choices,
    compute_dtype,
    disk_text,
    on_gpu,
    plan,
    read_base,
    runs_fused,
    time_text,
    tokenizer_bytes,
)
from halfbyte.train.gpu import cuda_bytes
from halfbyte.train.observer import Observer
from halfbyte.train.ranks import ALONE, Ranks

MOST_COMPACTED = 5000
"""Batches that are looked at before the run; one takes half a millisecond."""
GROWTH = 70_000_000
"""Resident bytes that Python and the libraries still take after the data is read: the model's modules, code that is
touched for the first time, thread stacks. Measured on runs of 135M and 1B."""


def make_loader(config: RunConfig, data: TokenizedData, ranks: Ranks = ALONE) -> BatchLoader:
    """The loader of `config`'s micro-batches."""
    return BatchLoader(
        data, micro_batch_size=config.train.micro_batch_size, packing=config.data.packing,
        max_seq_len=config.data.max_seq_len, seed=config.train.seed, rank=ranks.rank, world=ranks.world,
    )  # fmt: skip


def steps_of(config: RunConfig, loader: BatchLoader) -> int:
    """``train.steps``, or the optimizer steps of ``train.epochs`` passes; a fraction is of the epoch it falls in."""
    if config.train.steps:
        return config.train.steps
    whole = int(config.train.epochs)
    batches: float = sum(loader.batches_per_epoch(epoch) for epoch in range(whole))
    batches += (config.train.epochs - whole) * loader.batches_per_epoch(whole)
    return max(-(-round(batches) // config.train.gradient_accumulation_steps), 1)


def in_the_same_parts(
    config: RunConfig, checkpoint: Path | None, observer: Observer, ranks: Ranks = ALONE
) -> RunConfig:
    """`config` with the micro-batches of the checkpoint it goes on from, where they make the same step: a plan may
    have made them smaller than was asked for, and might choose otherwise today, with other memory in use. Where there
    were more or fewer ranks, as many of them as make the same step. Products run in tiles or panels as they did.

    Raises:
        FileError: the checkpoint is not one.
    """
    if checkpoint is None:
        return config
    saved, environment = checkpoint_origin(checkpoint)
    config = _in_its_scales(config, checkpoint)
    for sentence in keep_to(environment.get("panel_rows", {})):
        observer.note(sentence)
    train, parts = config.train, saved.get("train", {})
    size, count = parts.get("micro_batch_size", 0), parts.get("gradient_accumulation_steps", 0)
    before = environment.get("ranks", 1)
    if before != ranks.world:
        whole, own = size * count * before, train.micro_batch_size * ranks.world
        if whole % own or whole == own * train.gradient_accumulation_steps:
            return config
        observer.note(f"{whole // own} micro-batches in a step, as {before} ranks had {count}")
        return replace(config, train=replace(train, gradient_accumulation_steps=whole // own))
    if size == train.micro_batch_size or size * count != train.micro_batch_size * train.gradient_accumulation_steps:
        return config
    observer.note(f"micro-batches of {size}, as the checkpoint's")
    return replace(config, train=replace(train, micro_batch_size=size, gradient_accumulation_steps=count))


def _in_its_scales(config: RunConfig, checkpoint: Path) -> RunConfig:
    """With the scales that its base had: auto was absmax once, which is recorded as none."""
    if config.quant.scale != "auto":
        return config
    recipe = read_json(checkpoint / INFO).get("quant")
    if recipe is None or recipe.get("scale", "absmax") == config.quant.chosen_scale:
        return config
    return replace(config, quant=replace(config.quant, scale=recipe.get("scale", "absmax")))


def as_of_ranks(
    saved: dict[str, dict[str, Any]], environment: dict[str, Any], config: dict[str, dict[str, Any]], ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """The config of a checkpoint, as so many ranks would have set it: other micro-batches may make the same step."""
    before, now = saved["train"], config["train"]
    parts = "micro_batch_size", "gradient_accumulation_steps"
    if prod(before[part] for part in parts) * environment.get("ranks", 1) != prod(now[p] for p in parts) * ranks.world:
        return saved
    return saved | {"train": before | {part: now[part] for part in parts}}


def worst_of(config: RunConfig, loader: BatchLoader, *, shares: bool) -> Worst:
    """The most that goes through the model in any batch of the run.

    Args:
        shares: samples of a batch share what they begin with (`data.compact`); counted where that takes seconds at
            most, else taken not to happen.
    """
    batches = steps_of(config, loader) * config.train.gradient_accumulation_steps
    return loader.worst(batches, compact if shares and batches <= MOST_COMPACTED else None)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run that fits.

    Attributes:
        config: with the plan's choices.
        worst: the most that goes through the model in any batch.
        base, machine, runtime: what it was planned from.
    """

    config: RunConfig
    plan: Plan
    worst: Worst
    base: Base
    machine: Machine
    runtime: int

    @property
    def libraries(self) -> int | None:
        """Of `runtime`, what does not depend on the model: for later plans on this machine. None on a GPU."""
        return None if on_gpu(self.config, self.machine) else self.runtime - tokenizer_bytes(self.base)


def plan_run(
    config: RunConfig, data: TokenizedData, machine: Machine, observer: Observer, device: torch.device,
    ranks: Ranks = ALONE,
) -> Planned:  # fmt: skip
    """Plan before the base is loaded, and say the plan.

    Raises:
        ResourceError: nothing fits; says the smallest budget that would, and what to change. Or a disk has less room
            than the run will take of it.
    """
    machine = replace(
        machine, threads=torch.get_num_threads(), panel_rows=panel_rule().rows, ranks=ranks.local_world,
        world=ranks.world,
    )  # fmt: skip
    base = read_base(config.model.path, config.quant, compute_dtype(config, machine))
    runtime = cuda_bytes(device) if device.type == "cuda" else resident_memory() + GROWTH
    planned = _plan(config, data, base, machine, runtime, observer, ranks)
    check_disks(planned.config, planned.plan)
    return planned


def check_disks(config: RunConfig, made: Plan) -> None:
    """See that there is room for what the run will keep on disk; checkpoints take the place of those that are there.

    Raises:
        ResourceError: a disk has less; or a folder is not there.
    """
    output = Path(config.train.output)
    old = sum(file.stat().st_size for file in output.glob("checkpoint-*/*") if file.is_file())
    needed: dict[int, tuple[Path, int]] = {}
    for term, size in made.disk.items():
        folder = Path(offload_dir(config)) if term in SCRATCH else output
        with disk_errors(folder):
            device = os.stat(folder).st_dev
        more = max(size - old, 0) if term == "checkpoints" else size
        first, so_far = needed.get(device, (folder, 0))
        needed[device] = first, so_far + more
    for folder, size in needed.values():
        check_space(folder, size)


def offload_dir(config: RunConfig) -> str:
    """Where what has no room in memory lies."""
    return config.memory.offload_dir or config.train.output


def plan_as_found(
    planned: Planned, data: TokenizedData, observer: Observer, ranks: Ranks = ALONE, *, fused: bool
) -> Planned:
    """The plan again, where the loaded model's layers do not run as one function each though its kind does.

    Raises:
        ResourceError: then it does not fit.
    """
    if fused or not planned.base.architecture.fused:
        return planned
    base = replace(planned.base, architecture=replace(planned.base.architecture, fused=False))
    return _plan(planned.config, data, base, planned.machine, planned.runtime, observer, ranks)


def _plan(
    config: RunConfig, data: TokenizedData, base: Base, machine: Machine, runtime: int, observer: Observer,
    ranks: Ranks,
) -> Planned:  # fmt: skip
    shares = runs_fused(config, base)
    worst = worst_of(config, make_loader(config, data, ranks), shares=shares)
    work = Work(tokens=worst.tokens, targets=worst.targets, longest=worst.longest, runtime=runtime)
    made = plan(config, machine=machine, work=work, base=base)
    if not made.fits:
        raise refused(made)
    made = replace(made, choices=ranks.first(made.choices))  # other ranks may have had other memory in use
    chosen = apply_choices(config, made)
    loader = make_loader(chosen, data, ranks)
    observer.on_plan(chosen, made)
    observer.note(plan_text(made, steps_of(chosen, loader)))
    if chosen.train.micro_batch_size != config.train.micro_batch_size:
        worst = worst_of(chosen, loader, shares=shares)
    return Planned(config=chosen, plan=made, worst=worst, base=base, machine=machine, runtime=runtime)


def refused(made: Plan) -> ResourceError:
    """The error of a plan that does not fit."""
    assert made.budget is not None
    return ResourceError(
        f"{format_bytes(made.smallest_memory)} are needed at least, {format_bytes(made.budget)} are allowed",
        where=made.budget_source, why=f"most is held in {made.fullest}, {_largest_terms(made)}",
        fix=f"Give --memory {-(-made.smallest_memory // 10**6)}MB, or lower data.max_seq_len or lora.r",
    )  # fmt: skip


def _largest_terms(made: Plan) -> str:
    terms = sorted(made.terms.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{format_bytes(size)} {name.replace('_', ' ')}" for name, size in terms)


def plan_text(made: Plan, steps: int) -> str:
    """The plan of a run of `steps` steps as a short table."""
    width = max(map(len, made.terms), default=0)
    budget = f" of {format_bytes(made.budget)} ({made.budget_source})" if made.budget else ""
    peak = format_bytes(made.machine_peak)
    if made.machine_peak != made.peak_memory:
        peak = f"{format_bytes(made.peak_memory)} in each of {made.ranks} ranks, {peak} together"
    lines = [f"plan: at most {peak}{budget}, in {made.fullest}"]
    rows = sorted(made.terms.items(), key=lambda item: -item[1])
    lines += [f"  {name.replace('_', ' '):<{width}} {format_bytes(size):>9}" for name, size in rows]
    lines += [f"  to fit: {change}" for change in made.changes]
    lines.append(f"  {disk_text(made.disk)}")
    lines.append(f"  {time_text(made.seconds_per_step, steps)}")
    return "\n".join(lines)
