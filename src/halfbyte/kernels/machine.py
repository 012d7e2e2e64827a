"""What this machine can do at most, measured: the limits that every speed stands beside."""

from __future__ import annotations

import time
from functools import cache

import torch

from halfbyte.kernels.registry import cpu_choice

_ITERATIONS = 4_000_000
_BUFFER_FLOATS = 64 << 20
"""256 MB: far more than a last-level cache."""
_REPEATS = 5


@cache
def peak_gflops() -> float:
    """float32 multiply-adds in registers on all threads, GFLOP/s, the best of a few short runs; 0 where unknown."""
    library = cpu_choice().library
    best = 0.0
    for _ in range(_REPEATS if library is not None else 0):
        assert library is not None
        started = time.perf_counter()
        operations = library.call.hb_multiply_add(_ITERATIONS, torch.get_num_threads())
        best = max(best, operations * _ITERATIONS / (time.perf_counter() - started) / 1e9)
    return best


@cache
def read_gbytes_per_s() -> float:
    """Bytes read from main memory on all threads, GB/s, the best of a few passes over 256 MB; 0 where unknown."""
    library = cpu_choice().library
    if library is None or not library.call.hb_multiply_add(1, 1):  # no vectors to read with
        return 0.0
    buffer = torch.zeros(_BUFFER_FLOATS)
    best = 0.0
    for _ in range(_REPEATS):
        started = time.perf_counter()
        library.call.hb_read_all(buffer.data_ptr(), buffer.numel(), torch.get_num_threads())
        best = max(best, buffer.nbytes / (time.perf_counter() - started) / 1e9)
    return best
