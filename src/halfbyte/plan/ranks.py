"""Several ranks on one machine: what they map of the base is in memory once, all else in each of them."""

from __future__ import annotations

from halfbyte.config import RunConfig
from halfbyte.plan.base import Base
from halfbyte.plan.budget import Budget, on_gpu
from halfbyte.plan.machine import Machine
from halfbyte.plan.phases import apart


def shared_bytes(config: RunConfig, base: Base, machine: Machine) -> int:
    """Of a rank's resident memory, what is the same pages in all ranks: a base that is stored in 4 bits, mapped."""
    if machine.ranks == 1 or on_gpu(config, machine) or not base.in_4_bits or apart(config):
        return 0
    return base.linears + (0 if base.int8_embeddings else base.embeddings + base.head)


def together(peak: int, config: RunConfig, base: Base, machine: Machine) -> int:
    """What all ranks of the machine take where each has `peak` bytes resident; GPUs are each rank's own."""
    if on_gpu(config, machine):
        return peak
    return machine.ranks * peak - (machine.ranks - 1) * shared_bytes(config, base, machine)


def of_rank(budget: Budget, ranks: int, shared: int) -> Budget:
    """How much one of `ranks` may have resident, `shared` bytes of it the same pages in all."""
    if ranks == 1:
        return budget
    return Budget((budget.bytes + (ranks - 1) * shared) // ranks, f"{budget.source}, shared by {ranks} ranks")
