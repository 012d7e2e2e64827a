"""A device made of host memory: it counts, it is late, and it spoils what is not waited for."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from halfbyte.store import AlignedBuffer, Memory

POISON = 0xA5


class FakeDevice(Memory):
    """A device that the disk cannot reach: all memory but what `allocate_host` gave. A copy is between the two, or an
    error; its target is poison until it is done.

    Attributes:
        held, peak: bytes that `allocate` gave and that are there, and the most that were.
        host, host_peak: the same of host memory for copies.
        to_device, to_host: bytes moved.
    """

    is_host = False

    def __init__(self, copy_seconds: float = 0.0) -> None:
        self._copy_seconds = copy_seconds
        self._lock = threading.Lock()
        self._here, self._there = dict[int, int](), dict[int, int]()
        self.peak = self.host_peak = self.to_device = self.to_host = 0

    @property
    def held(self) -> int:
        return sum(self._here.values())

    @property
    def host(self) -> int:
        return sum(self._there.values())

    def allocate(self, nbytes: int) -> Tensor:
        tensor = _allocate(nbytes, self._here)
        self.peak = max(self.peak, self.held)
        return tensor

    def allocate_host(self, nbytes: int) -> Tensor:
        tensor = _allocate(nbytes, self._there)
        self.host_peak = max(self.host_peak, self.host)
        return tensor

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.nbytes == source.nbytes
        up = _is_in(source, self._there)
        assert up != _is_in(target, self._there), "between the device and its own host memory only"
        with self._lock:
            self.to_device += target.nbytes if up else 0
            self.to_host += 0 if up else target.nbytes
        target.fill_(POISON)
        time.sleep(self._copy_seconds)
        target.copy_(source)


class LateDevice(FakeDevice):
    """Its work is begun with `launch` and done later, in turn, as a GPU's: also the zeros of new memory."""

    def __init__(self, copy_seconds: float = 0.0, work_seconds: float = 0.0) -> None:
        super().__init__(copy_seconds)
        self._work_seconds = work_seconds
        self._stream = ThreadPoolExecutor(1)

    def launch(self, work: Callable[[], object]) -> Future[object]:
        def late() -> object:
            time.sleep(self._work_seconds)
            return work()

        return self._stream.submit(late)

    def finish(self) -> None:
        """Wait for all work; no more is taken."""
        self._stream.shutdown()

    def allocate(self, nbytes: int) -> Tensor:
        tensor = super().allocate(nbytes).fill_(POISON)
        self.launch(tensor.zero_)
        return tensor

    def mark(self) -> Callable[[], object]:
        return self._stream.submit(lambda: None).result


def _allocate(nbytes: int, blocks: dict[int, int]) -> Tensor:
    buffer = AlignedBuffer(nbytes)
    tensor = buffer.tensor
    blocks[tensor.data_ptr()] = nbytes
    weakref.finalize(buffer.view.obj, blocks.pop, tensor.data_ptr())
    return tensor


def _is_in(tensor: Tensor, blocks: dict[int, int]) -> bool:
    start = tensor.data_ptr()
    return any(first <= start and start + tensor.nbytes <= first + nbytes for first, nbytes in list(blocks.items()))
