"""Frozen layers that are fetched ahead of use into a ring of buffers in the fast memory, in a training step's order.

They lie in their files. As many of a device's layers as a budget allows are copied to host memory when they are read
first, and come from there. A step goes up through the layers and down again. Where the next use is guessed wrongly the
layer is waited for; what a user gets is always the one asked for. Nothing is kept in the page cache where direct I/O
works.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from torch import Tensor

from halfbyte.store.direct_io import ALIGNMENT, DirectFile, round_up
from halfbyte.store.memory import Memory
from halfbyte.store.tiers import HostTier, Staging

GAP = 2**18
"""Bytes between two tensors that are read over rather than read around."""
READERS = 2
"""Buffers that are filled at a time."""


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes lie: from `start` to `end` in `file`."""

    file: Path
    start: int
    end: int


@dataclass(frozen=True)
class _Window:
    """A stretch of a file that is read at once, and where it goes in a buffer."""

    file: Path
    start: int
    end: int
    place: int


@dataclass(frozen=True)
class _Layout:
    """A layer's windows, and where in the buffer each of its tensors then lies."""

    windows: tuple[_Window, ...]
    tensors: tuple[tuple[int, int], ...]
    nbytes: int


def _layout(extents: Sequence[Extent]) -> _Layout:
    windows: list[_Window] = []
    places: dict[int, tuple[int, int]] = {}
    place = 0
    for number in sorted(range(len(extents)), key=lambda n: (str(extents[n].file), extents[n].start)):
        extent = extents[number]
        last = windows[-1] if windows else None
        end = round_up(extent.end)
        if last is not None and last.file == extent.file and extent.start - last.end <= GAP:
            windows[-1] = last = _Window(last.file, last.start, max(end, last.end), last.place)
        else:
            start = extent.start // ALIGNMENT * ALIGNMENT
            last = _Window(extent.file, start, end, place)
            windows.append(last)
        place = last.place + last.end - last.start
        first = last.place + extent.start - last.start
        places[number] = first, first + extent.end - extent.start
    return _Layout(tuple(windows), tuple(places[number] for number in range(len(extents))), place)


@dataclass(eq=False)
class _Slot:
    buffer: Tensor
    ready: Callable[[], object]
    """Waits for the work on it."""
    layer: int | None = None
    read: Future[None] | None = None
    users: int = 0
    used: int = 0
    """When it was last used, counted in uses."""


@dataclass
class Traffic:
    """What a store has done so far."""

    bytes_read: int = 0
    """From files."""
    bytes_from_host: int = 0
    """From copies in host memory."""
    uses: int = 0
    waits: int = 0
    """Uses whose layer was not asked for ahead of time."""


@dataclass(eq=False)
class LayerStore:
    """The bytes of some layers, in the fast memory only while they are used or about to be.

    Args:
        layers: the extents of each layer's tensors, in the order in which a forward pass uses the layers.
        ring: buffers, each of the size of the largest layer; at least 2, or there is no reading ahead.
        memory: the fast one, where layers are used.
        host_budget: bytes that copies of layers may take of host memory, where that is not the fast memory itself.
    """

    layers: Sequence[Sequence[Extent]]
    ring: int = 3
    memory: Memory = field(default_factory=Memory)
    host_budget: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        if self.ring < 2:
            raise ValueError(f"a ring of {self.ring} buffers leaves none to read ahead into")
        self._layouts = [_layout(extents) for extents in self.layers]
        size = max((layout.nbytes for layout in self._layouts), default=0)
        buffers = [self.memory.allocate(size) for _ in range(min(self.ring, len(self._layouts)))]
        self._slots = [_Slot(buffer, self.memory.mark()) for buffer in buffers]
        self._place_copies(0 if self.memory.is_host else self.host_budget)
        self._staging = Staging(self.memory)
        files = {window.file for layout in self._layouts for window in layout.windows}
        self._files = {file: DirectFile(file) for file in sorted(files)}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="halfbyte-read")
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """What the ring takes of the fast memory."""
        return sum(slot.buffer.nbytes for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """What copies take of host memory."""
        return self._host.nbytes

    @property
    def stored_bytes(self) -> int:
        """What one pass over all layers fetches."""
        return sum(layout.nbytes for layout in self._layouts)

    @property
    def how(self) -> str:
        """How files are read, and why not directly where they are not."""
        return "; ".join(sorted({file.why for file in self._files.values()}))

    @contextmanager
    def use(self, layer: int, *, backward: bool = False, turns: bool = False) -> Iterator[list[Tensor]]:
        """The tensors of `layer` as flat uint8, valid inside the block only.

        Args:
            layer: its number.
            backward: whether this pass goes down.
            turns: whether the pass after the one that is going on goes the other way: a forward pass that a backward
                follows. It decides what is read ahead, nothing else.

        Raises:
            FileError, ResourceError: the file cannot be read any more.
        """
        with self._lock:
            slot = self._find(layer)
            if slot is None:
                self.traffic.waits += 1
                slot = self._start(layer, keep={layer})
            slot.users += 1
            self.traffic.uses += 1
            slot.used = self.traffic.uses
        try:
            self._wait(slot)
            with self._lock:
                ahead = list(islice(self._order(layer, backward=backward, turns=turns), len(self._slots)))
                for following in ahead[: len(self._slots) - 1]:
                    if self._find(following) is None and self._free(keep={layer, *ahead}):
                        self._start(following, keep={layer, *ahead})
            yield [slot.buffer[start:end] for start, end in self._layouts[layer].tensors]
        finally:
            with self._lock:
                slot.users -= 1
                slot.ready = self.memory.mark()

    def shrink(self) -> int:
        """Give back a buffer that lies idle; two always stay, and reading ahead gets shorter by one. Results stay.

        Returns:
            its bytes, or 0 where none could go.
        """
        with self._lock:
            idle = self._free(keep=set())
            if len(self._slots) <= 2 or not idle:
                return 0
            slot = min(idle, key=lambda s: s.used)
            self._slots.remove(slot)
            return slot.buffer.nbytes

    def close(self) -> None:
        """Stop reading and give the memory back; tensors handed out must not be used any more."""
        self._readers.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._host.close()
        self._slots.clear()

    def _place_copies(self, budget: int) -> None:
        """Take room in host memory for as many layers as `budget` allows, those spread among the others."""
        self._host = HostTier(self.memory, budget)
        self._places: dict[int, int] = {}
        """Where the copy of a layer lies."""
        self._copied: set[int] = set()
        """Layers whose copy is there."""
        most = max((layout.nbytes for layout in self._layouts), default=1)
        for layer in spread(min(budget // most, len(self._layouts)), len(self._layouts)):
            self._places[layer] = self._host.nbytes
            self._host.grow(self._host.nbytes + self._layouts[layer].nbytes)

    def _order(self, layer: int, *, backward: bool, turns: bool) -> Iterator[int]:
        """The layers after `layer`, as the passes to come use them."""
        last = len(self._layouts) - 1
        if backward:
            yield from range(layer - 1, -1, -1)
            yield from range(last + 1)
            return
        yield from range(layer + 1, last + 1)
        yield from range(last, -1, -1) if turns else range(last + 1)

    def _find(self, layer: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _free(self, keep: set[int]) -> list[_Slot]:
        """Slots that may be filled anew: not in use, nothing on its way, no layer that is wanted soon."""
        return [
            slot for slot in self._slots
            if not slot.users and slot.layer not in keep and (slot.read is None or slot.read.done())
        ]  # fmt: skip

    def _start(self, layer: int, keep: set[int]) -> _Slot:
        free = self._free(keep) or [slot for slot in self._slots if not slot.users]
        if not free:
            raise RuntimeError(f"all {len(self._slots)} buffers are in use")
        slot = min(free, key=lambda s: s.used)
        if slot.read is not None and not slot.read.cancel():
            slot.read.exception()  # a wrong guess may still be on its way
        nbytes = self._layouts[layer].nbytes
        if layer in self._copied:
            self.traffic.bytes_from_host += nbytes
        else:
            self.traffic.bytes_read += nbytes
        slot.layer = layer
        slot.read = self._readers.submit(self._fill, slot.buffer, slot.ready, layer)
        return slot

    def _fill(self, buffer: Tensor, ready: Callable[[], object], layer: int) -> None:
        """A worker's job: the bytes of `layer` into `buffer`, once the work on what it holds is done."""
        ready()
        layout, place = self._layouts[layer], self._places.get(layer)
        if place is not None and layer in self._copied:
            self._host.read(place, buffer[: layout.nbytes])
            return
        for window in layout.windows:
            file = self._files[window.file]
            size = min(window.end, file.nbytes) - window.start
            self._staging.read(file, window.start, buffer[window.place : window.place + size])
        if place is not None:
            self._host.write(place, buffer[: layout.nbytes])
            self._copied.add(layer)

    def _wait(self, slot: _Slot) -> None:
        assert slot.read is not None
        try:
            slot.read.result()
        except BaseException:
            slot.layer = None  # not to be found again with half of its bytes
            raise


def spread(count: int, total: int) -> list[int]:
    """`count` of the numbers below `total`, evenly apart."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
