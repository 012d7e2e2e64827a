"""The memory in which bytes are worked on, the fast one: the host's own, or a GPU's."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.store.direct_io import AlignedBuffer


class Memory:
    """Host memory as the fast place: what it is on a machine without a GPU."""

    is_host = True
    """The disk can be read straight into it."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is in it."""
        return tensor.device.type == "cpu"

    def allocate(self, nbytes: int) -> Tensor:
        """Zeros, uint8 (nbytes,). Other threads may write there after a `mark` of this one."""
        return AlignedBuffer(nbytes).tensor

    def allocate_host(self, nbytes: int) -> Tensor:
        """Host memory that copies here are fast from, uint8 (nbytes,), zeros, aligned for direct I/O."""
        return AlignedBuffer(nbytes).tensor

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Between here and host memory; done on return. Called by workers, beside the work."""
        target.copy_(source)

    def mark(self) -> Callable[[], object]:
        """What a worker calls to wait until the work begun so far on this thread is done."""
        return _nothing


class CudaMemory(Memory):
    """A GPU's memory: copies run beside the work, on a stream of their own."""

    is_host = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cuda"

    def allocate(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)

    def allocate_host(self, nbytes: int) -> Tensor:
        # torch's own pinned memory comes in powers of two, up to twice what a budget counts (pytorch issue 150517).
        buffer = AlignedBuffer(nbytes, _Pinned)
        pages = buffer.view.obj
        assert isinstance(pages, _Pinned)
        pages.pin(buffer.tensor.data_ptr())
        return buffer.tensor

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()

    def mark(self) -> Callable[[], object]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


class _Pinned(mmap.mmap):
    """Pages that the GPU's driver knows, and reaches without a copy, until they go."""

    _address = 0

    def pin(self, address: int) -> None:
        """Tell the driver of these pages, which begin at `address`."""
        cudart = torch.cuda.cudart()
        torch.cuda.check_error(int(cudart.cudaHostRegister(address, len(self), 0)))
        self._address, self._unregister = address, cudart.cudaHostUnregister

    def __del__(self) -> None:
        if self._address:
            self._unregister(self._address)


def memory_of(device: torch.device) -> Memory:
    """The fast place for what is worked on at `device`."""
    return CudaMemory(device) if device.type == "cuda" else Memory()


def _nothing() -> None:
    pass
