"""Writing safetensors files whose tensors, or pieces of them, arrive one at a time and are gone before the next comes.

The header comes first in the file and is known last, so room is left for it and filled up with spaces, which the
format allows. Readers want every tensor aligned to its dtype and the format allows no holes: a tensor whose size is
a multiple of 64 bytes goes to disk at once, the others (scales, JSON) wait for the end, widest dtype first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from halfbyte.dtypes import SAFETENSORS_DTYPES

ALIGNMENT = 64
MAX_SHARD_BYTES = 5_000_000_000
ENTRY_BYTES = 160
"""More than what a tensor's entry in the header needs besides its name."""
_METADATA = {"__metadata__": {"format": "pt"}}
_CODES = {getattr(torch, name): code for code, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Pieces:
    """A tensor of which only a piece is in memory at a time: `parts` are its elements in order, in any shapes.

    All of them are taken before the next tensor is asked for, each before the one after it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterator[Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Pieces:
        """A tensor that is whole."""
        return cls(tensor.dtype, tuple(tensor.shape), iter([tensor]))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return prod(self.shape) * self.dtype.itemsize


class _Shard:
    """One file while it is being written."""

    def __init__(self, path: Path, header_bytes: int) -> None:
        self.path = path
        self.names: list[str] = []
        self.bytes = 0
        self._room = -(-(8 + header_bytes) // ALIGNMENT) * ALIGNMENT - 8
        self._header_used = 64
        self._file = path.open("xb")
        self._file.seek(8 + self._room)
        self._entries: dict[str, Any] = dict(_METADATA)
        self._position = 0
        self._waiting: dict[str, Pieces] = {}

    def fits(self, name: str, tensor: Pieces, max_bytes: int) -> bool:
        """Whether `tensor` may still go into this file; the first one always may."""
        header = self._header_used + ENTRY_BYTES + len(name.encode())
        return not self.names or (self.bytes + tensor.nbytes <= max_bytes and header <= self._room)

    def add(self, name: str, tensor: Pieces) -> None:
        """Take `tensor`, to disk now or at the end."""
        self.names.append(name)
        self.bytes += tensor.nbytes
        self._header_used += ENTRY_BYTES + len(name.encode())
        if tensor.nbytes % ALIGNMENT:
            parts = [part.reshape(-1).clone() for part in tensor.parts]
            self._waiting[name] = replace(tensor, parts=iter(parts))
        else:
            self._write(name, tensor)

    def finish(self) -> None:
        """Write what waits, then the header."""
        for name in sorted(self._waiting, key=lambda n: -self._waiting[n].dtype.itemsize):
            self._write(name, self._waiting[name])
        header = _json(self._entries)
        if len(header) > self._room:
            raise RuntimeError("ENTRY_BYTES is too small")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        if not self._position:
            self._file.truncate(8 + self._room)
        self.close()

    def close(self) -> None:
        """Also when the tensors stop coming."""
        self._file.close()

    def _write(self, name: str, tensor: Pieces) -> None:
        end = self._position + tensor.nbytes
        self._entries[name] = _entry(tensor, self._position, end)
        for part in tensor.parts:
            if part.numel():
                self._position += self._file.write(
                    part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                )
        if self._position != end:
            raise RuntimeError(f"{name}: the parts are not of the size announced")


def write_one(path: Path, tensors: Mapping[str, Tensor | Pieces]) -> None:
    """Write `tensors`, of any device, as one new file, with one piece in memory. Durability is the caller's."""
    pieces = {name: Pieces.of(given) if isinstance(given, Tensor) else given for name, given in tensors.items()}
    end = sum(piece.nbytes for piece in pieces.values())
    shard = _Shard(
        path, len(_json({**_METADATA, **{name: _entry(piece, end, end) for name, piece in pieces.items()}}))
    )
    with closing(shard):
        for name, piece in pieces.items():
            shard.add(name, piece)
        shard.finish()


def _entry(tensor: Pieces, start: int, end: int) -> dict[str, Any]:
    return {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}


def _json(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor | Pieces]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    header_bytes: int = 2**16,
) -> tuple[list[Path], int]:
    """`ShardWriter` for tensors that come as asked for.

    Returns:
        The files written, and the bytes of all tensors.
    """
    with ShardWriter(folder, max_shard_bytes=max_shard_bytes, header_bytes=header_bytes) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
        return writer.finish(), writer.bytes


class ShardWriter:
    """Safetensors files of at most `max_shard_bytes` (or one tensor) each, and an index, of tensors as they are given.

    Holds one tensor, or one piece of it, and the small ones of a file in memory. `folder` must exist; durability is
    the caller's (write into a temporary folder).

    Args:
        header_bytes: room left for each file's header; a file that fills it is ended early (about 250 per tensor).
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, header_bytes: int = 2**16) -> None:
        self._folder, self._max_shard_bytes, self._header_bytes = folder, max_shard_bytes, header_bytes
        self._shards: list[_Shard] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for shard in self._shards:
            shard.close()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors given."""
        return sum(shard.bytes for shard in self._shards)

    def add(self, name: str, given: Tensor | Pieces) -> None:
        """Write one tensor, or keep it for the end of its file where it is small."""
        tensor = Pieces.of(given) if isinstance(given, Tensor) else given
        if not self._shards or not self._shards[-1].fits(name, tensor, self._max_shard_bytes):
            if self._shards:
                self._shards[-1].finish()
            self._start(max(self._header_bytes, 2 * ENTRY_BYTES + len(name.encode())))
        self._shards[-1].add(name, tensor)

    def finish(self) -> list[Path]:
        """End the last file, give all of them their names; the files, the index last."""
        shards = self._shards
        if not shards:
            self._start(2 * ENTRY_BYTES)
        shards[-1].finish()
        if len(shards) == 1:
            return [shards[0].path.rename(self._folder / SINGLE_NAME)]
        files, weight_map = [], {}
        for number, shard in enumerate(shards, 1):
            files.append(shard.path.rename(self._folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"))
            weight_map.update(dict.fromkeys(shard.names, files[-1].name))
        index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
        return [*files, self._folder / INDEX_NAME]

    def _start(self, room: int) -> None:
        self._shards.append(_Shard(self._folder / f"shard-{len(self._shards):05d}.safetensors", room))
