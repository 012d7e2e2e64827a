"""Counts and lengths of a .gguf header are not believed."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from halfbyte.config.gguf_header import GgufTensor, read_gguf_header
from halfbyte.errors import ModelError

U32, STRING, ARRAY = 4, 8, 9


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def number(key: bytes, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def items(key: bytes, kind: int, count: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, kind, count) + data


def tensor(name: bytes, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(*parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def test_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header(
        number(b"llama.block_count", 2), text(b"name") + struct.pack("<I", STRING) + text("größe".encode()),
        items(b"tokens", STRING, 3, text(b"a") + text(b"") + text(b"ccc")), items(b"scores", 6, 2, bytes(8)),
        tensor(b"blk.0.w", 32, 4, kind=2, offset=64), keys=4, tensors=1,
    ))  # fmt: skip
    fields, tensors = read_gguf_header(path)
    assert fields == {"llama.block_count": 2, "name": "größe", "tokens": 3, "scores": 2}
    assert tensors == {"blk.0.w": GgufTensor((4, 32), 2, 64)}


BAD = {
    "nothing": (b"", "too early"),
    "another magic": (header(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (header(version=1), "version 1"),
    "other byte order": (header(version=3 << 24), "other order"),
    "2^63 fields": (header(keys=2**63), "limits.fields is 10,000"),
    "2^60 tensors": (header(tensors=2**60), "tensors"),
    "a field that is not there": (header(keys=1), "too early"),
    "a name of 2^62 bytes": (header(text(b"x", 2**62), keys=1), "limits.name_bytes is 512"),
    "a long name": (header(text(b"x" * 513), keys=1), "bytes of text"),
    "no UTF-8": (header(text(b"\xff\xfe"), keys=1), "UTF-8"),
    "a field twice": (header(number(b"a", 1), number(b"a", 2), keys=2), "there twice"),
    "type 77": (header(text(b"a") + struct.pack("<I", 77), keys=1), "no type 77"),
    "2^63 numbers": (header(items(b"a", 6, 2**63, b""), keys=1), "limits.items is 10,000,000"),
    "numbers that are not there": (header(items(b"a", 6, 1000, bytes(8)), keys=1), "too early"),
    "texts that are not there": (header(items(b"a", STRING, 10**7, text(b"x")), keys=1), "list of texts"),
    "a text beyond the end": (header(items(b"a", STRING, 1, text(b"x", 2**60)), keys=1), "list of texts"),
    "lists in lists": (header(items(b"a", ARRAY, 1, b""), keys=1), "a list of type 9"),
    "a tensor twice": (header(tensor(b"a", 4), tensor(b"a", 4), tensors=2), "there twice"),
    "five dimensions": (header(tensor(b"a", 1, 1, 1, 1, 1), tensors=1), "dimensions"),
    "2^31 dimensions": (header(text(b"a") + struct.pack("<I", 2**31), tensors=1), "dimensions"),
    "no elements": (header(tensor(b"a", 0, 4), tensors=1), "shape"),
    "2^64 elements": (header(tensor(b"a", 2**32, 2**32), tensors=1), "shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_ones(name: str, tmp_path: Path) -> None:
    data, said = BAD[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    started = time.perf_counter()
    with pytest.raises(ModelError, match=r"model\.gguf: (is not a readable GGUF file: |.* limits\.)") as caught:
        read_gguf_header(path)
    assert said in str(caught.value)
    assert time.perf_counter() - started < 1


def test_cut_anywhere(tmp_path: Path) -> None:
    whole = header(
        number(b"a", 2), items(b"b", STRING, 2, text(b"x") + text(b"yy")), tensor(b"t", 4, 2), keys=2, tensors=1
    )
    path = tmp_path / "model.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_gguf_header(path)
