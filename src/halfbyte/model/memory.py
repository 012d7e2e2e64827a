"""Memory: of this process, as the operating system counts it, and the sides of a model's matrices."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from transformers import PreTrainedModel


def resident_memory() -> int:
    """Bytes resident now. Threads ask often: on Linux nothing is allocated for it that could split up the heap."""
    if sys.platform == "linux":
        with suppress(OSError), open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(128).split()[1]) * mmap.PAGESIZE
    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Bytes that processes may still take without anything being swapped out."""
    return int(psutil.virtual_memory().available)


def peak_memory() -> int:
    """Most bytes ever resident since the process began."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # Not ru_maxrss, which begins with the size of the process that started this one (a notebook, a test run).
        with suppress(OSError, StopIteration):
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def matrix_sides(model: PreTrainedModel) -> tuple[int, int]:
    """Width of the hidden states, and the largest side of a matrix that is not of the vocabulary's size."""
    vocabulary, width = model.get_input_embeddings().weight.shape
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    matrices = [shape for shape in shapes if len(shape) == 2 and vocabulary not in shape]
    return int(width), max((max(shape) for shape in matrices), default=int(width))
