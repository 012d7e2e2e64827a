"""How much memory a run may take: what the user set, or what its container allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from halfbyte.config import RunConfig
from halfbyte.dtypes import parse_bytes

UNLIMITED = 1 << 60
"""What cgroup v1 says where there is no limit is somewhat above this."""


@dataclass(frozen=True)
class Budget:
    """`bytes` of memory, and who says so."""

    bytes: int
    source: str


def budget_of(config: RunConfig) -> Budget | None:
    """The smallest of memory.budget, memory.host_budget (on a machine without a GPU both mean its RAM) and the
    container's limit; None where there is none of them."""
    settings = {"memory.budget": config.memory.budget, "memory.host_budget": config.memory.host_budget}
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
