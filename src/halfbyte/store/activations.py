"""What a forward pass saves for the backward pass, on disk in between.

Autograd asks for it in the reverse of the order in which it was saved, so writing goes on behind the forward pass and
reading ahead of the backward pass. At most a few tensors are in memory on either way.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.store.direct_io import ALIGNMENT, AlignedBuffer, DirectFile, round_up

LEAST = ALIGNMENT
"""Bytes below which a tensor stays: what it would save is less than what keeping account of it takes."""
BEHIND = 2
"""Tensors that may wait to be written."""
AHEAD = 2
"""Tensors that are read before they are asked for."""


class _Entry:
    """One saved tensor: in memory until it is written, then in the file, then in memory again if it was read ahead."""

    def __init__(self, tensor: Tensor, place: int) -> None:
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
    """Saved tensors in a scratch file that has no name and grows as it must.

    Args:
        folder: where the file lies.

    Attributes:
        bytes_written, bytes_read: since it was made.
    """

    def __init__(self, folder: str | Path) -> None:
        self._file = DirectFile.scratch(folder, 0)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="halfbyte-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="halfbyte-read")
        self._places: dict[int, list[int]] = {}
        self._end = 0
        self._entries: list[_Entry] = []
        self._unwritten: deque[_Entry] = deque()
        self.bytes_written = self.bytes_read = 0

    def hooks(self) -> AbstractContextManager[Any]:
        """Inside the block, what autograd saves goes to disk: every tensor of `LEAST` bytes that is no parameter."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def close(self) -> None:
        """Stop and delete the file."""
        self._writer.shutdown(cancel_futures=True)
        self._reader.shutdown(cancel_futures=True)
        self._file.close()

    def _pack(self, tensor: Tensor) -> Tensor | _Ticket:
        if tensor.nbytes < LEAST or isinstance(tensor, nn.Parameter) or not tensor.is_contiguous():
            return tensor
        tensor = tensor.detach()  # or what waits to be written would hold on to the graph
        while len(self._unwritten) > BEHIND:
            _done(self._unwritten.popleft().written)
        entry = _Entry(tensor, self._place(round_up(tensor.nbytes)))
        entry.written = self._writer.submit(self._write, entry, tensor)
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

    def _place(self, room: int) -> int:
        """Where in the file `room` bytes may go."""
        free = self._places.get(room)
        if free:
            return free.pop()
        self._end += room
        self._file.grow(self._end)
        return self._end - room

    def _write(self, entry: _Entry, tensor: Tensor) -> None:
        self._file.write_from(tensor, entry.place)
        entry.tensor = None

    def _start_reading(self, entry: _Entry) -> Future[Tensor]:
        if entry.read is None:
            self.bytes_read += entry.nbytes
            entry.read = self._reader.submit(self._read, entry)
        return entry.read

    def _read(self, entry: _Entry) -> Tensor:
        _done(entry.written)
        buffer = AlignedBuffer(entry.nbytes)
        self._file.read_into(buffer.tensor, entry.place)
        return buffer.tensor.view(entry.dtype).view(entry.shape)

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
