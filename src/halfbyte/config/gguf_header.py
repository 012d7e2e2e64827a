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

from halfbyte.config.limits import check_limit
from halfbyte.errors import ModelError, read_error

MAX_DIMS, MAX_ELEMENTS = 4, 2**48
"""What GGML has at most, and far more than any tensor."""
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
            header.bound("fields", num_keys, "fields")
            header.bound("tensors", num_tensors, "tensors")
            fields: dict[str, Any] = {}
            for _ in range(num_keys):
                key = header.text("name_bytes")
                if key in fields:
                    raise header.error(f"the field {key!r} is there twice")
                fields[key] = header.value(header.numbers("I")[0])
            tensors: dict[str, GgufTensor] = {}
            for _ in range(num_tensors):
                name = header.text("name_bytes")
                if name in tensors:
                    raise header.error(f"the tensor {name!r} is there twice")
                tensors[name] = header.tensor(name)
    except OSError as error:
        raise read_error(ModelError, path, error) from None
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

    def bound(self, limit: str, count: int, what: str) -> None:
        check_limit(limit, count, what, self._path)

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

    def text(self, limit: str) -> str:
        (length,) = self.numbers("Q")
        self.bound(limit, length, "bytes of text")
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(f"{raw[:40]!r} is no UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text("text_bytes")
        if kind in _FORMATS:
            return self.numbers(_FORMATS[kind])[0]
        if kind != _ARRAY:
            raise self.error(f"there is no type {kind} of fields")
        item, count = self.numbers("IQ")
        self.bound("items", count, "items of a list")
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
        if dims > MAX_DIMS:
            raise self.error(f"the tensor {name!r} has {dims} dimensions, GGML's have {MAX_DIMS} at most")
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
