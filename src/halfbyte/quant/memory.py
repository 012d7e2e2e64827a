"""Memory for what stays: the codes of weights, and tensors as they are read."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def lasting(nbytes: int) -> Tensor:
    """(nbytes,) uint8, zeros, in a mapping of its own: it goes back to the system when it is dropped, where the C
    library would keep it, with holes in it; and its pages are 2 MB where the system has such and it is as large. A
    product that reads many rows of codes at a time otherwise waits for the addresses of 4 KB pages.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes, **_PRIVATE)
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
