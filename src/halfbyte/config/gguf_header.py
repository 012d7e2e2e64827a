"""What the header of a .gguf file says.

Everything it counts is bounded before anything is allocated for it. Readers in other packages believe a length of
2^63: they see a file only after this one has.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from halfbyte.errors import ModelError

MAX_KEYS, MAX_TENSORS, MAX_ITEMS = 10_000, 100_000, 10_000_000
"""Fields, tensors, and items of a list (a vocabulary has some 250,000)."""
MAX_NAME_BYTES, MAX_STRING_BYTES, MAX_DIMS, MAX_ELEMENTS = 512, 16 * 2**20, 4, 2**48
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: its shape as torch would give it, GGML's number of its type, bytes behind the header."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Numbers and texts in a .gguf file's header (of lists only their length), and its tensors by llama.cpp's names.

    Raises:
        ModelError: not such a file, cut short, or beyond the limits above.
    """
    try:
        with path.open("rb") as file, _mapped(file.fileno()) as data:
            header = _Header(data, path)
            if header.take(4) != b"GGUF":
                raise header.error("it does not begin with GGUF")
            version, num_tensors, num_keys = header.numbers("IQQ")
            if version not in (2, 3):
                raise header.error(f"version {version} is none of 2 and 3 (or its bytes are in the other order)")
            header.bound("fields", num_keys, MAX_KEYS)
            header.bound("tensors", num_tensors, MAX_TENSORS)
            fields: dict[str, Any] = {}
            for _ in range(num_keys):
                key = header.text(MAX_NAME_BYTES)
                if key in fields:
                    raise header.error(f"the field {key!r} is there twice")
                fields[key] = header.value(header.numbers("I")[0])
            tensors: dict[str, GgufTensor] = {}
            for _ in range(num_tensors):
                name = header.text(MAX_NAME_BYTES)
                if name in tensors:
                    raise header.error(f"the tensor {name!r} is there twice")
                tensors[name] = header.tensor(name)
    except OSError as error:
        raise ModelError("cannot be read", where=str(path), why=error.strerror or str(error)) from None
    return fields, tensors


@contextmanager
def _mapped(file: int) -> Iterator[bytes | mmap.mmap]:
    if os.fstat(file).st_size == 0:  # cannot be mapped
        yield b""
        return
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as data:
        yield data


class _Header:
    """Reads on in a file, never beyond its end."""

    def __init__(self, data: bytes | mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0

    def error(self, why: str) -> ModelError:
        return ModelError("is not a readable GGUF file", where=str(self._path), why=why)

    def bound(self, what: str, count: int, most: int) -> None:
        if count > most:
            raise self.error(f"{count} {what}, {most} are the most that is read")

    def take(self, size: int) -> bytes:
        self._need(size)
        self._at += size
        return self._data[self._at - size : self._at]

    def _need(self, size: int) -> None:
        missing = self._at + size - len(self._data)
        if missing > 0:
            raise self.error(f"it ends {missing} bytes too early, in its header")

    def numbers(self, letters: str) -> tuple[Any, ...]:
        return struct.unpack("<" + letters, self.take(struct.calcsize("<" + letters)))

    def text(self, most: int) -> str:
        (length,) = self.numbers("Q")
        self.bound("bytes of text", length, most)
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(f"{raw[:40]!r} is no UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text(MAX_STRING_BYTES)
        if kind in _FORMATS:
            return self.numbers(_FORMATS[kind])[0]
        if kind != _ARRAY:
            raise self.error(f"there is no type {kind} of fields")
        item, count = self.numbers("IQ")
        self.bound("items of a list", count, MAX_ITEMS)
        if item in _SIZES:
            self._need(_SIZES[item] * count)
            self._at += _SIZES[item] * count
        elif item == _STRING:
            self._skip_texts(count)
        else:
            raise self.error(f"a list of type {item}")
        return count

    def tensor(self, name: str) -> GgufTensor:
        (dims,) = self.numbers("I")
        self.bound(f"dimensions of {name!r}", dims, MAX_DIMS)
        shape = self.numbers(f"{dims}Q") if dims else ()
        if not 0 < prod(shape) <= MAX_ELEMENTS:
            raise self.error(f"the tensor {name!r} has the shape {list(shape)}")
        kind, offset = self.numbers("IQ")
        return GgufTensor(tuple(reversed(shape)), kind, offset)

    def _skip_texts(self, count: int) -> None:
        data, at = self._data, self._at
        last = len(data) - 8
        for _ in range(count):
            if at > last:
                raise self.error("it ends in a list of texts, in its header")
            at += 8 + int.from_bytes(data[at : at + 8], "little")
        if at > len(data):
            raise self.error("it ends in a list of texts, in its header")
        self._at = at
