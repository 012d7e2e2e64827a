"""How fast the disk gives what a run reads from it, tried on the model's own file."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

TRIED_BYTES = 1 << 25
"""Read in one piece: 32 MB, 30 ms at 1 GB/s and a third of a second from a slow disk."""


def read_speed(folder: Path) -> float | None:
    """Bytes a second from the largest safetensors file of `folder`, past the page cache.

    Returns:
        None where there is no such file, it is shorter than what is tried, or the file system takes no direct I/O.
    """
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    if not files or files[-1].stat().st_size < 2 * TRIED_BYTES or not hasattr(os, "O_DIRECT"):
        return None
    with mmap.mmap(-1, TRIED_BYTES) as buffer:
        try:
            file = os.open(files[-1], os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return None
        try:
            started = time.perf_counter()
            count = os.preadv(file, [buffer], files[-1].stat().st_size // 2 // mmap.PAGESIZE * mmap.PAGESIZE)
            return count / (time.perf_counter() - started)
        except OSError:
            return None
        finally:
            os.close(file)
