"""How long an optimizer step takes: its operations over the speed that was measured on this machine."""

from __future__ import annotations

from halfbyte.config import RunConfig
from halfbyte.plan.base import Base
from halfbyte.plan.machine import Machine
from halfbyte.plan.phases import Work, adapter_parameters, compute_dtype, sizes


def operations(config: RunConfig, base: Base, machine: Machine, work: Work) -> float:
    """Floating-point operations of a micro-batch, forward and backward.

    A weight takes 2 a token forward and 2 backward (it is frozen: no gradient of its own), 2 more where a checkpointed
    layer is computed again, all but the down projection; an adapter's parameter 6; the head 4 a supervised token;
    attention 4 and 10 for each pair of tokens and query feature (forward; backward with scores made again), halved.
    """
    s = sizes(config, base, machine, work.tokens)
    a = s.arch
    again = 1 - a.hidden * a.intermediate * a.layers / max(base.linear_weights, 1) if s.checkpoint else 0
    weights = (4 + 2 * again) * base.linear_weights * work.tokens
    adapters = 6 * adapter_parameters(s) * work.tokens
    head = 4 * a.vocab * a.hidden * work.targets
    pairs = work.tokens * min(work.longest, work.tokens) / 2
    attention = (14 + (4 if s.checkpoint else 0)) * pairs * a.query * a.layers
    return weights + adapters + head + attention


def seconds_per_step(config: RunConfig, base: Base, machine: Machine, work: Work) -> float | None:
    """None where no step of this compute dtype was measured."""
    gflops = machine.gflops.get(compute_dtype(config, machine))
    steps = config.train.gradient_accumulation_steps
    return steps * operations(config, base, machine, work) / (gflops * 1e9) if gflops else None
