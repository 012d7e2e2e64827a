"""A command under a memory limit that the kernel enforces: what does not fit is killed, not slowed down."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

ROOT = Path("/sys/fs/cgroup")


@contextmanager
def memory_limit(limit: int) -> Iterator[Path]:
    """A fresh control group (version 1 or 2) whose processes may use `limit` bytes, page cache included.

    Page cache is given back when memory is short, so it is no reason to be killed. Needs root.
    """
    old = ROOT / "memory"
    group = (old if old.is_dir() else ROOT) / f"halfbyte-{os.getpid()}"
    if os.geteuid() != 0:
        sys.exit("a memory limit needs root: run this as root, or in a container of that size")
    if not old.is_dir():
        (ROOT / "cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(limit))
        swap = group / ("memory.memsw.limit_in_bytes" if old.is_dir() else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit) if old.is_dir() else "0")
        yield group
    finally:
        group.rmdir()


def inside(group: Path, command: list[str]) -> list[str]:
    """`command`, run in `group`."""
    return ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]


def kills(group: Path) -> int:
    """Processes of `group` that were killed for memory."""
    file = group / "memory.oom_control"
    text = (file if file.exists() else group / "memory.events").read_text()
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)


def run_limited(
    limit: int, command: list[str], stderr: TextIO | None = None
) -> tuple[subprocess.CompletedProcess[str], int]:
    """The finished command (standard output caught), and how many of its processes the limit killed."""
    with memory_limit(limit) as group:
        done = subprocess.run(inside(group, command), stdout=subprocess.PIPE, stderr=stderr, text=True)
        return done, kills(group)
