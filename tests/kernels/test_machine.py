"""The machine's limits are measured, and no kernel is faster than they are."""

from __future__ import annotations

import torch

from halfbyte.kernels import machine
from halfbyte.kernels.registry import cpu_choice


def test_limits_are_plausible() -> None:
    library = cpu_choice().library
    if library is None or library.isa == "baseline":
        assert (machine.peak_gflops(), machine.read_gbytes_per_s()) == (0.0, 0.0)
        return
    assert 1.0 < machine.peak_gflops() < 1000.0 * torch.get_num_threads()
    assert 0.1 < machine.read_gbytes_per_s() < 5000.0


def test_the_sum_is_read_whole() -> None:
    library = cpu_choice().library
    if library is None or library.isa == "baseline":
        return
    x = torch.ones(3 * 16 * 8 * 5)
    for threads in (1, 3):
        assert library.call.hb_read_all(x.data_ptr(), x.numel(), threads) == x.numel()
