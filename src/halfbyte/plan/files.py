"""The names, shapes and dtypes of a model's tensors from the headers of its files, without reading a weight."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from halfbyte.dtypes import ITEMSIZE, SAFETENSORS_DTYPES
from halfbyte.errors import ModelError, ResourceError

MAX_HEADER_BYTES = 100_000_000
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_GGUF_16BIT = {0: "float32", 1: "float16"}
"""What halfbyte's reader gives of F32 and F16; everything else becomes bfloat16."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; `dtype` is what the loader makes of it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEMSIZE[self.dtype]


def locate(path: str) -> Path:
    """The local folder or .gguf file called `path`; of a hub id the folder that holds its config.json.

    Raises:
        ModelError: there is no such thing.
        ResourceError: the hub cannot be asked.
    """
    local = Path(path).expanduser()
    if path and local.exists():
        return local
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ModelError("no such model", where=path or "model.path", fix="Give a folder, a .gguf file or a hub id")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "config.json")).parent
    except Exception as error:  # no network, no such repository, no permission: each its own type
        raise ResourceError(
            "neither a local path nor to be fetched from the Hugging Face hub", where=path,
            why=str(error).strip().splitlines()[0][:300],
        ) from error  # fmt: skip


def safetensors_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files; empty where there are none.

    Raises:
        ModelError: a header is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    single = folder / "model.safetensors"
    for path in [single] if single.exists() else sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
            tensors |= {
                name: StoredTensor(tuple(map(int, entry["shape"])), SAFETENSORS_DTYPES[entry["dtype"]])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError("the header is not safetensors'", where=str(path), why=str(error)) from None
    return tensors


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Numbers and texts in a .gguf file's header (of lists only their length), and its tensors (llama.cpp's names).

    Raises:
        ModelError: not such a file.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError("is not a readable GGUF file", where=str(path))
            _, num_tensors, num_keys = struct.unpack("<IQQ", file.read(20))
            fields = {}
            for _ in range(num_keys):
                key = _string(file)
                fields[key] = _value(file, *struct.unpack("<I", file.read(4)))
            tensors = {}
            for _ in range(num_tensors):
                name = _string(file)
                (dims,) = struct.unpack("<I", file.read(4))
                shape = struct.unpack(f"<{dims}Q", file.read(8 * dims))
                kind, _ = struct.unpack("<IQ", file.read(12))
                tensors[name] = StoredTensor(tuple(reversed(shape)), _GGUF_16BIT.get(kind, "bfloat16"))
    except (OSError, struct.error, KeyError, MemoryError, UnicodeDecodeError, OverflowError) as error:
        raise ModelError("is not a readable GGUF file", where=str(path), why=str(error)) from None
    return fields, tensors


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return struct.unpack("<" + _GGUF_FORMATS[kind], file.read(_GGUF_SIZES[kind]))[0]
    item, count = struct.unpack("<IQ", file.read(12))
    if item in _GGUF_SIZES:
        file.seek(_GGUF_SIZES[item] * count, 1)
    else:
        for _ in range(count):
            if item == _STRING:
                (length,) = struct.unpack("<Q", file.read(8))
                file.seek(length, 1)
            else:
                _value(file, item)
    return count
