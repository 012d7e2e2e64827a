"""The places where pages are: the fast memory, where they are worked on, and what is behind it, in order of speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.dtypes import format_bytes
from halfbyte.store.direct_io import AlignedBuffer, DirectFile


class Memory:
    """Host memory as the fast place: what it is on a machine without a GPU."""

    is_host = True
    """The disk can be read straight into it."""

    def allocate(self, nbytes: int) -> Tensor:
        """Zeros, uint8 (nbytes,)."""
        return AlignedBuffer(nbytes).tensor

    def allocate_host(self, nbytes: int) -> Tensor:
        """Host memory that copies here are fast from, uint8 (nbytes,), zeros."""
        return AlignedBuffer(nbytes).tensor

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Between here and host memory; done on return. Called by the pool's workers."""
        target.copy_(source)

    def mark(self) -> Callable[[], object]:
        """What a worker calls to wait until the work begun so far on this thread is done."""
        return _nothing


class CudaMemory(Memory):
    """A GPU's memory: copies run beside the work, on a stream of their own. (Not run on a GPU yet: docs/gpu.md.)"""

    is_host = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)

    def allocate_host(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()

    def mark(self) -> Callable[[], object]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


def memory_of(device: torch.device) -> Memory:
    """The fast place for what is worked on at `device`."""
    return CudaMemory(device) if device.type == "cuda" else Memory()


class Tier(Protocol):
    """A place for pages behind the fast memory. Pages are numbered from 0; new ones are zeros."""

    capacity: int
    """Pages it may hold."""

    @property
    def nbytes(self) -> int:
        """What its pages take."""

    def grow(self, pages: int) -> None:
        """Have room for `pages`, or raise."""

    def read(self, page: int, target: Tensor) -> None:
        """Fill `target`, in the fast memory; done on return."""

    def write(self, page: int, source: Tensor) -> None:
        """Keep `source`, in the fast memory; done on return."""


class HostTier:
    """Host memory behind a device's: `budget` bytes of it."""

    def __init__(self, memory: Memory, page_bytes: int, budget: int) -> None:
        self.capacity = budget // page_bytes
        self._memory, self._page_bytes, self._pages = memory, page_bytes, list[Tensor]()

    @property
    def nbytes(self) -> int:
        return len(self._pages) * self._page_bytes

    def grow(self, pages: int) -> None:
        more = pages - len(self._pages)
        self._pages += self._memory.allocate_host(more * self._page_bytes).split(self._page_bytes) if more > 0 else ()

    def read(self, page: int, target: Tensor) -> None:
        self._memory.copy(target, self._pages[page])

    def write(self, page: int, source: Tensor) -> None:
        self._memory.copy(self._pages[page], source)

    def __str__(self) -> str:
        return f"{format_bytes(self.nbytes)} in host memory"


class DiskTier:
    """A scratch file in `folder`, its room taken before it is needed."""

    capacity = 1 << 62

    def __init__(self, memory: Memory, page_bytes: int, folder: str | Path) -> None:
        self._memory, self._page_bytes, self._folder = memory, page_bytes, folder
        self._file: DirectFile | None = None
        self._staging = SimpleQueue[Tensor]()

    @property
    def nbytes(self) -> int:
        return self._file.nbytes if self._file else 0

    def grow(self, pages: int) -> None:
        if self._file is None:
            self._file = DirectFile.scratch(self._folder, pages * self._page_bytes)
        else:
            self._file.grow(pages * self._page_bytes)

    def read(self, page: int, target: Tensor) -> None:
        assert self._file is not None
        staging = target if self._memory.is_host else self._take()
        self._file.read_into(staging, page * self._page_bytes)
        if staging is not target:
            self._memory.copy(target, staging)
            self._staging.put(staging)

    def write(self, page: int, source: Tensor) -> None:
        assert self._file is not None
        staging = source if self._memory.is_host else self._take()
        if staging is not source:
            self._memory.copy(staging, source)
        self._file.write_from(staging, page * self._page_bytes)
        if staging is not source:
            self._staging.put(staging)

    def __str__(self) -> str:
        return f"{format_bytes(self.nbytes)} in {self._folder}" + (f" ({self._file.why})" if self._file else "")

    def _take(self) -> Tensor:
        """Host memory on the way to a device, one page for each worker."""
        try:
            return self._staging.get_nowait()
        except Empty:
            return self._memory.allocate_host(self._page_bytes)


def _nothing() -> None:
    pass
