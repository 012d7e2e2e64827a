"""What a forward pass saves for the backward pass: behind the fast memory in between, on disk or in host memory.

Autograd asks for it in the reverse of the order in which it was saved, so writing goes on behind the forward pass and
reading ahead of the backward pass. At most a few tensors are in the fast memory on either way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.store.direct_io import ALIGNMENT, round_up
from halfbyte.store.memory import Memory
from halfbyte.store.tiers import Tier, tiers_behind

LEAST = ALIGNMENT
"""Bytes below which a tensor stays: what it would save is less than what keeping account of it takes."""
BEHIND = 2
"""Tensors that may wait to be written."""
AHEAD = 2
"""Tensors that are read before they are asked for."""


class _Place(NamedTuple):
    tier: Tier
    start: int


class _Entry:
    """One saved tensor: in memory until it is written, then in its place, and in memory again if it was read ahead."""

    def __init__(self, tensor: Tensor, place: _Place) -> None:
        self.tensor: Tensor | None = tensor
        self.place, self.shape, self.dtype, self.nbytes = place, tensor.shape, tensor.dtype, tensor.nbytes
        self.written: Future[None] | None = None
        self.read: Future[Tensor] | None = None


class _Ticket:
    """What autograd holds in the place of a tensor. When it is dropped, so is the tensor."""

    def __init__(self, store: ActivationStore, entry: _Entry) -> None:
        self.store, self.entry = store, entry

    def __del__(self) -> None:
        self.store._forget(self.entry)


class ActivationStore:
    """Saved tensors, in host memory behind a device's and in a scratch file that has no name; both grow as they must.

    Args:
        folder: where the file lies.
        memory: the fast one, whose tensors are saved.
        host_budget: bytes of host memory to fill before the file, where that is not the fast memory itself.

    Attributes:
        bytes_written, bytes_read: since it was made.
    """

    def __init__(self, folder: str | Path, memory: Memory | None = None, host_budget: int = 0) -> None:
        self._memory = memory or Memory()
        self._tiers = tiers_behind(self._memory, host_budget, folder)
        self._tiers[-1].grow(0)  # a folder that cannot be written shows now
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="halfbyte-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="halfbyte-read")
        self._places: dict[int, list[_Place]] = {}
        """Free ones, by their room."""
        self._entries: list[_Entry] = []
        self._unwritten: deque[_Entry] = deque()
        self.bytes_written = self.bytes_read = 0

    def hooks(self) -> AbstractContextManager[Any]:
        """Inside the block, what autograd saves leaves the fast memory: tensors of `LEAST` bytes but parameters."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def close(self) -> None:
        """Stop, give host memory back and delete the file."""
        self._writer.shutdown(cancel_futures=True)
        self._reader.shutdown(cancel_futures=True)
        for tier in self._tiers:
            tier.close()

    def _pack(self, tensor: Tensor) -> Tensor | _Ticket:
        small = tensor.nbytes < LEAST or not self._memory.holds(tensor)
        if small or isinstance(tensor, nn.Parameter) or not tensor.is_contiguous():
            return tensor
        tensor = tensor.detach()  # or what waits to be written would hold on to the graph
        while len(self._unwritten) > BEHIND:
            _done(self._unwritten.popleft().written)
        entry = _Entry(tensor, self._place(round_up(tensor.nbytes)))
        entry.written = self._writer.submit(self._write, entry, tensor, self._memory.mark())
        self._unwritten.append(entry)
        self._entries.append(entry)
        self.bytes_written += entry.nbytes
        return _Ticket(self, entry)

    def _unpack(self, packed: Tensor | _Ticket) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        entry = packed.entry
        tensor = entry.tensor
        if tensor is None:
            tensor = self._start_reading(entry).result()
            entry.read = None  # autograd may ask again, and must not find it kept for that
        index = self._entries.index(entry)
        for earlier in self._entries[max(index - AHEAD, 0) : index]:
            if earlier.tensor is None:
                self._start_reading(earlier)
        return tensor

    def _place(self, room: int) -> _Place:
        """Where `room` bytes may go."""
        free = self._places.get(room)
        if free:
            return free.pop()
        tier = next(tier for tier in self._tiers if tier.nbytes + room <= tier.capacity)
        start = tier.nbytes
        tier.grow(start + room)
        return _Place(tier, start)

    def _write(self, entry: _Entry, tensor: Tensor, computed: Callable[[], object]) -> None:
        computed()
        entry.place.tier.write(entry.place.start, tensor.view(-1).view(torch.uint8))
        entry.tensor = None

    def _start_reading(self, entry: _Entry) -> Future[Tensor]:
        if entry.read is None:
            self.bytes_read += entry.nbytes
            buffer = self._memory.allocate(entry.nbytes)
            entry.read = self._reader.submit(self._read, entry, buffer, self._memory.mark())
        return entry.read

    def _read(self, entry: _Entry, buffer: Tensor, free: Callable[[], object]) -> Tensor:
        _done(entry.written)
        free()
        entry.place.tier.read(entry.place.start, buffer)
        return buffer.view(entry.dtype).view(entry.shape)

    def _forget(self, entry: _Entry) -> None:
        """Autograd needs it no more: its place is free once nothing is on the way to or from it."""
        for future in (entry.written, entry.read):
            if future is not None and not future.cancel():
                future.exception()
        self._entries.remove(entry)
        self._places.setdefault(round_up(entry.nbytes), []).append(entry.place)


def _done(future: Future[None] | None) -> None:
    """Wait for a write, and raise what it raised; one that was cancelled was needed no more."""
    assert future is not None
    if not future.cancelled():
        future.result()
