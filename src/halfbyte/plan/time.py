"""How long an optimizer step takes: its operations or what it reads and writes, over the speeds of this machine."""

from __future__ import annotations

from datetime import timedelta

from halfbyte.config import RunConfig
from halfbyte.plan.base import Base
from halfbyte.plan.machine import Machine
from halfbyte.plan.phases import (
    Work,
    adapter_parameters,
    layer_bytes,
    sizes,
    speed_key,
    state_bytes,
    states_in_memory,
)


def operations(config: RunConfig, base: Base, machine: Machine, work: Work) -> float:
    """Floating-point operations of a micro-batch, forward and backward.

    A weight that a token sees (of a mixture, in some experts) takes 2 forward and 2 backward (it is frozen, without a
    gradient of its own), 2 more where a checkpointed layer is computed again, all but the down projection; an
    adapter's parameter 6; the head 4 a supervised token; attention 4 and 10 for each pair of tokens and query feature
    (forward; backward with scores made again), halved.
    """
    s = sizes(config, base, machine, work.tokens)
    a = s.arch
    seen = base.linear_weights - base.expert_weights * (1 - a.experts_per_token / max(a.experts, 1))
    again = 1 - a.hidden * a.intermediate * a.layers / max(seen, 1) if s.checkpoint else 0
    weights = (4 + 2 * again) * seen * work.tokens
    adapters = 6 * adapter_parameters(s) * work.tokens
    head = 4 * a.vocab * a.hidden * work.targets
    pairs = work.tokens * min(work.longest, work.tokens) / 2
    attention = (14 + (4 if s.checkpoint else 0)) * pairs * a.query * a.layers
    return weights + adapters + head + attention


def disk_bytes(config: RunConfig, base: Base, machine: Machine, work: Work) -> int:
    """Read and written in an optimizer step: streamed layers forward and backward, pages and activations both ways."""
    s = sizes(config, base, machine, work.tokens)
    layers = max(s.arch.layers - config.memory.resident_layers, 0) if config.memory.weights == "stream" else 0
    pages = state_bytes(s, config.optim.bits) - states_in_memory(config, s, machine) if config.optim.paged else 0
    micro_batches = config.train.gradient_accumulation_steps
    inputs = s.arch.layers * work.tokens * s.arch.hidden * s.itemsize if s.offloaded else 0
    return 2 * (layers * layer_bytes(base) + pages + micro_batches * inputs)


def seconds_per_step(
    config: RunConfig, base: Base, machine: Machine, work: Work, disk_speed: float | None
) -> float | None:
    """The longer of computing and of the disk's work, which go on beside each other.

    Args:
        disk_speed: bytes a second; None: not known.

    Returns:
        None where no step of this compute dtype was measured, or the run needs a disk of unknown speed.
    """
    gflops = machine.gflops.get(speed_key(config, machine))
    moved = disk_bytes(config, base, machine, work)
    if not gflops or (moved and not disk_speed):
        return None
    computing = config.train.gradient_accumulation_steps * operations(config, base, machine, work) / (gflops * 1e9)
    return max(computing, moved / disk_speed if disk_speed else 0.0)


def time_text(seconds: float | None, steps: int) -> str:
    """A step's time and that of `steps`, for people; 0 steps: not known how many."""
    if seconds is None:
        return (
            "time: not known, because this machine's speed was not measured yet (halfbyte doctor does, every larger "
            "run too), or the run reads from a disk, whose speed is tried on the model's file, and that is not there"
        )
    whole = f", {timedelta(seconds=round(steps * seconds))} for {steps} steps" if steps else ""
    return f"{seconds:,.1f} s a step{whole}"
