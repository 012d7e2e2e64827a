"""How much memory a run may take: what the user set, what its container allows, or what a GPU has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from halfbyte.config import RunConfig
from halfbyte.dtypes import parse_bytes
from halfbyte.plan.machine import Machine

UNLIMITED = 1 << 60
"""What cgroup v1 says where there is no limit is somewhat above this."""


@dataclass(frozen=True)
class Budget:
    """`bytes` of memory, and who says so."""

    bytes: int
    source: str


def on_gpu(config: RunConfig, machine: Machine) -> bool:
    """Whether the run computes on a CUDA device: as model.device says, or because the machine has one."""
    return config.model.device == "cuda" or (config.model.device == "auto" and machine.gpu is not None)


def device_budget(config: RunConfig, machine: Machine) -> Budget | None:
    """How much of the memory that it computes in a run may take; None: of a GPU that is not there, all."""
    if not on_gpu(config, machine):
        return budget_of(config)
    if config.memory.budget:
        return Budget(parse_bytes(config.memory.budget), "memory.budget")
    return Budget(machine.gpu.memory, f"the memory of the {machine.gpu.name}") if machine.gpu is not None else None


def budget_of(config: RunConfig, *, beside_gpu: bool = False) -> Budget | None:
    """Of the host's memory: the smallest of memory.budget, memory.host_budget and the container's limit; None where
    there is none of them.

    Args:
        beside_gpu: memory.budget is the GPU's, and does not count here.
    """
    settings = {"memory.host_budget": config.memory.host_budget}
    if not beside_gpu:
        settings = {"memory.budget": config.memory.budget} | settings
    found = [Budget(parse_bytes(text), name) for name, text in settings.items() if text]
    limit = container_limit()
    if limit is not None:
        found.append(limit)
    return min(found, key=lambda budget: budget.bytes, default=None)


def container_limit(proc: Path = Path("/proc/self"), root: Path = Path("/sys/fs/cgroup")) -> Budget | None:
    """The least memory limit of this process's control group and those above it, version 1 or 2."""
    try:
        lines = (proc / "cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            limits += _limits(root, path, "memory.max") + _limits(root / "unified", path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(root / "memory", path, "memory.limit_in_bytes")
    return Budget(min(limits), "the container's memory limit") if limits else None


def _limits(root: Path, path: str, name: str) -> list[int]:
    """The limits of the group called `path` and of those it lies in; a container may see its own group as the root."""
    limits = []
    parts = [part for part in path.split("/") if part and part != ".."]
    for depth in range(len(parts) + 1):
        file = root.joinpath(*parts[:depth], name)
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < UNLIMITED:
            limits.append(int(text))
    return limits
