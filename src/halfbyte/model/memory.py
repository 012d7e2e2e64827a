"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import sys

import psutil


def resident_memory() -> int:
    """Bytes resident now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Most bytes ever resident since the process began."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
