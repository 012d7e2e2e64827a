"""Does a run fit, with which settings, and what is the most that would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from halfbyte.config import RunConfig
from halfbyte.config.schema import check_stored, require_config
from halfbyte.dtypes import format_bytes, parse_bytes
from halfbyte.plan.base import Base, read_base
from halfbyte.plan.behind import on_disk
from halfbyte.plan.budget import Budget, device_budget, on_gpu
from halfbyte.plan.check import check_layers
from halfbyte.plan.disk import read_speed
from halfbyte.plan.files import locate
from halfbyte.plan.largest import largest
from halfbyte.plan.machine import Machine, physical_memory, this_machine
from halfbyte.plan.merging import merge_memory
from halfbyte.plan.phases import (
    RING,
    Work,
    apart,
    compute_dtype,
    fullest,
    layer_bytes,
    phases,
    runs_fused,
    runtime_bytes,
    sizes,
    state_bytes,
    worst_case,
)
from halfbyte.plan.ranks import shared_bytes, together
from halfbyte.plan.time import disk_bytes, operations, seconds_per_step

CHOSEN = {
    "train": ("micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"), "optim": ("paged",),
    "memory": ("weights", "resident_layers", "activations", "optimizer_budget"),
}  # fmt: skip
"""Settings that a plan may change: the same numbers, to the bit but for micro-batches, whose sums round otherwise."""
PAGED_SHARE, LEAST_PAGED = 10, 2**24
"""Of the optimizer's states, what stays in memory where they have to be paged, and the least it is worth to page."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take; sizes in bytes.

    Attributes:
        fits: whether `machine_peak` is within the budget; True where there is none.
        peak_memory: at most resident at any time, from load to the last answer; of several ranks in each.
        ranks: how many share the budget.
        shared: bytes of the base that all ranks have the same pages of.
        machine_peak: of all ranks together; `peak_memory` where there is one.
        terms: what is held at that moment, by what it is for; they sum to `peak_memory`.
        phases: the peak of each phase.
        fullest: the phase and the moment of the peak.
        disk: what the run has on disk at most, by what it is for, beside the base: `behind.SCRATCH` in
            memory.offload_dir, the rest in train.output.
        choices: the settings the plan holds for: yours, or changed ones to fit.
        changes: which of them are not what you set, and why, a sentence each.
        smallest_memory: the smallest budget that would work, with every choice made for memory.
        largest: the most sequences, tokens, rank or layers of such width that fit with these choices, each alone;
            None without a budget.
        merge_memory: what `halfbyte merge` will take afterwards, by format: a command of its own, not in
            `peak_memory`.
        seconds_per_step: None where nothing was measured on this machine.
        pass_operations: floating-point operations of one forward and backward of a micro-batch.
        notes: what the plan does not know.
    """

    fits: bool
    budget: int | None
    budget_source: str
    peak_memory: int
    ranks: int
    shared: int
    machine_peak: int
    terms: dict[str, int]
    phases: dict[str, int]
    fullest: str
    disk: dict[str, int]
    choices: dict[str, Any]
    changes: tuple[str, ...]
    smallest_memory: int
    largest: dict[str, int] | None
    merge_memory: dict[str, int]
    seconds_per_step: float | None
    pass_operations: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "changes": list(self.changes), "notes": list(self.notes)}


def plan(
    config: RunConfig, *, machine: Machine | None = None, work: Work | None = None, base: Base | None = None
) -> Plan:
    """Plan the run: memory of every phase, the cheapest settings that fit the budget, time.

    Neither torch nor weights are needed: sizes come from config.json and the headers of the files.

    Args:
        machine: default: this one, without measurements.
        work: what the data is known to be; default: full packs of which every token is supervised.
        base: as `read_base` gave it, to plan again without reading.

    Raises:
        TypeError: `config` is no RunConfig.
        ModelError: the model cannot be found, or its config cannot be read.
        ConfigError: its weights are to be left on disk, and are not stored in 4 bits; or a setting names layers that
            it does not have.
    """
    require_config(config)
    machine = machine or this_machine()
    base = base or read_base(config.model.path, config.quant, compute_dtype(config, machine))
    check_layers(config, base)
    if base.exact:  # of a config alone it is not known
        check_stored(config.memory.weights, config.model.path, in_4_bits=base.in_4_bits)
    budget = device_budget(config, machine)

    def peak(candidate: RunConfig, of: Base = base) -> int:
        one = fullest(phases(candidate, of, machine, _work(candidate, config, work)))[1].total
        return together(one, candidate, of, machine)

    candidates = list(_cheapest_first(config, base, machine))
    chosen = config
    if budget is not None:
        chosen = next((each for each in candidates if peak(each) <= budget.bytes), candidates[-1])
        chosen = _keep_what_fits(chosen, layer_bytes(base) * machine.ranks, base, budget.bytes, peak)
    own = _work(chosen, config, work)
    found = phases(chosen, base, machine, own)
    phase, moment = fullest(found)
    in_all = together(moment.total, chosen, base, machine)
    fits = budget is None or in_all <= budget.bytes
    disk_speed = read_speed(locate(config.model.path)) if disk_bytes(chosen, base, machine, own) else None
    return Plan(
        fits=fits, budget=budget.bytes if budget else None, budget_source=budget.source if budget else "",
        peak_memory=moment.total, ranks=machine.ranks, shared=shared_bytes(chosen, base, machine), machine_peak=in_all,
        terms={name: size for name, size in moment.terms.items() if size},
        phases={name: led.peak.total for name, led in found.items()}, fullest=f"{phase}: {moment.where}",
        disk=on_disk(chosen, base, machine, own),
        choices=_choices(chosen), changes=_changes(config, chosen, budget), smallest_memory=peak(candidates[-1]),
        largest=largest(chosen, base, budget.bytes, peak) if budget and fits and work is None else None,
        merge_memory=merge_memory(base.architecture, runtime_bytes(base, machine)),
        seconds_per_step=seconds_per_step(chosen, base, machine, own, disk_speed),
        pass_operations=operations(chosen, base, machine, own),
        notes=_notes(config, base, machine, work, budget, in_all),
    )  # fmt: skip


def apply_choices(config: RunConfig, made: Plan) -> RunConfig:
    """`config` with the plan's choices."""
    return replace(config, **{
        section: replace(getattr(config, section), **{name: made.choices[name] for name in names})
        for section, names in CHOSEN.items()
    })  # fmt: skip


def _cheapest_first(config: RunConfig, base: Base, machine: Machine) -> Iterator[RunConfig]:
    """The run as it is set, then with ever less memory, each step on top of those before it."""
    least = config
    for least in _smaller_batches(config):
        yield least
    states, allowed = state_bytes(sizes(least, base, machine, 1), config.optim.bits), config.memory.optimizer_budget
    kept = min(max(states // PAGED_SHARE, LEAST_PAGED), parse_bytes(allowed))
    if kept < (parse_bytes(allowed) if config.optim.paged else states):
        text = f"{-(-kept // 2**20)}MiB" if kept >= 2**20 else str(kept)
        memory = replace(least.memory, optimizer_budget=text)
        least = replace(least, optim=replace(least.optim, paged=True), memory=memory)
        yield least
    if config.memory.activations != "disk":
        least = replace(least, memory=replace(least.memory, activations="disk"))
        yield least
    if config.memory.weights == "resident" and not apart(config) and base.in_4_bits:
        yield replace(least, memory=replace(least.memory, weights="stream"))


def _keep_what_fits(
    chosen: RunConfig, layer: int, base: Base, budget: int, peak: Callable[[RunConfig], int]
) -> RunConfig:
    """`chosen` with as many of its streamed layers, of `layer` bytes, in memory as `budget` has room for, but some."""
    room = budget - peak(chosen)
    if chosen.memory.weights != "stream" or room <= 0:
        return chosen
    own = chosen.memory.resident_layers
    most = min(own + room // layer, max(base.architecture.layers - RING, 0))
    for layers in range(most, own, -1):  # a GPU's allocator rounds up: one or two fewer
        kept = replace(chosen, memory=replace(chosen.memory, resident_layers=layers))
        if peak(kept) <= budget:
            return kept
    return chosen


def _smaller_batches(config: RunConfig) -> Iterator[RunConfig]:
    """Smaller micro-batches and more of them; then those again with gradient checkpointing, which takes time."""
    batch, accumulation = config.train.micro_batch_size, config.train.gradient_accumulation_steps
    smaller = [size for size in range(batch, 0, -1) if batch % size == 0]
    for checkpointing in (False, True) if not config.train.gradient_checkpointing else (True,):
        for size in smaller:
            yield replace(config, train=replace(
                config.train, micro_batch_size=size, gradient_checkpointing=checkpointing,
                gradient_accumulation_steps=accumulation * (batch // size),
            ))  # fmt: skip


def _work(candidate: RunConfig, config: RunConfig, work: Work | None) -> Work:
    """`work` is of the micro-batch in `config`; a smaller one has its share, rounded up to whole packs."""
    if work is None:
        return worst_case(candidate)
    size = candidate.train.micro_batch_size
    if size == config.train.micro_batch_size:
        return work
    tokens = min(work.tokens, size * candidate.data.max_seq_len)
    return replace(work, tokens=tokens, targets=min(work.targets, tokens))


def _choices(config: RunConfig) -> dict[str, Any]:
    return {name: getattr(getattr(config, section), name) for section, names in CHOSEN.items() for name in names}


def _changes(config: RunConfig, chosen: RunConfig, budget: Budget | None) -> tuple[str, ...]:
    if budget is None or chosen == config:
        return ()
    changes = []
    if chosen.train.micro_batch_size != config.train.micro_batch_size:
        changes.append(
            f"train.micro_batch_size {config.train.micro_batch_size} -> {chosen.train.micro_batch_size}, "
            f"train.gradient_accumulation_steps {config.train.gradient_accumulation_steps} -> "
            f"{chosen.train.gradient_accumulation_steps}: the same step in smaller parts"
        )
    if chosen.train.gradient_checkpointing != config.train.gradient_checkpointing:
        changes.append("train.gradient_checkpointing false -> true: the same numbers, about a third more time")
    if (chosen.optim.paged, chosen.memory.optimizer_budget) != (config.optim.paged, config.memory.optimizer_budget):
        kept = format_bytes(parse_bytes(chosen.memory.optimizer_budget))
        changes.append(f"optim.paged true, memory.optimizer_budget {kept}: the other moments wait behind")
    if chosen.memory.activations != config.memory.activations:
        changes.append(
            "memory.activations resident -> disk: what the backward pass needs waits there, or in a GPU's host memory"
        )
    if chosen.memory.weights != config.memory.weights:
        stay = chosen.memory.resident_layers
        which = f"all layers but {stay}" if stay else "all layers"
        changes.append(f"memory.weights resident -> stream: {which} are read as they compute, twice a step")
    return tuple(changes)


def _notes(
    config: RunConfig, base: Base, machine: Machine, work: Work | None, budget: Budget | None, peak: int
) -> tuple[str, ...]:
    notes = []
    if on_gpu(config, machine):
        notes.append(
            "of the GPU's memory: what the host's takes beside it is not planned, nor that layers and activations in "
            "it come faster than from the disk"
        )
    arch = base.architecture
    if not runs_fused(config, base):
        notes.append(
            f"{arch.family or 'this architecture'} runs as transformers wrote it: what its layers keep is estimated, "
            "cautiously, from Llama's"
        )
    if arch.experts and not base.expert_weights:
        notes.append(f"{arch.experts} experts a layer are stored in one tensor, and stay as they are")
    if not base.exact:
        notes.append(f"sizes are from config.json alone, weights taken to be stored in {arch.dtype}")
    if machine.ranks > 1 and not base.in_4_bits and not on_gpu(config, machine):
        notes.append(f"each of {machine.ranks} ranks holds a copy of the base; stored quantized, they would share one")
    longest = config.data.max_seq_len
    if arch.context and longest > arch.context:
        notes.append(f"data.max_seq_len {longest} is more than the {arch.context} positions the model was made for")
    ram = physical_memory() if not on_gpu(config, machine) else None
    if ram and budget is None and peak > ram:
        notes.append(f"this machine has {format_bytes(ram)}: give --memory, and the plan finds what fits")
    if budget and peak > budget.bytes and base.exact and not base.in_4_bits:
        notes.append("stored quantized (halfbyte quantize), its layers could be streamed, which takes less")
    if work is None:
        notes.append("the data is not looked at: full packs of which every token is learned")
    return tuple(notes)
