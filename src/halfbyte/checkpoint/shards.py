"""Reading safetensors folders tensor by tensor, so that memory holds what is being worked on.

Files are read with plain reads: mapped pages count as resident memory and would break a budget. Who wants them shared
between processes, and left to the system to drop, asks for it.
Nothing outside the folder is opened, and nothing is allocated for what a header claims before it is checked.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.config.limits import check_limit
from halfbyte.dtypes import ITEMSIZE, SAFETENSORS_DTYPES
from halfbyte.errors import ModelError, read_error
from halfbyte.quant.memory import lasting

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


_DTYPES = ", ".join(SAFETENSORS_DTYPES)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` and `end` are byte offsets in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFolder:
    """The tensors of a model folder, with or without an index.

    Args:
        mapped: let `read` give views of the mapped file: pages are read when touched, belong to the page cache, and
            all processes that map it share them. Writing to one changes neither the file nor what others see.

    Attributes:
        tensors: TensorInfo by name, in file order.
    """

    def __init__(self, folder: str | Path, *, mapped: bool = False) -> None:
        folder = Path(folder)
        self._mappings: dict[Path, Tensor] | None = {} if mapped else None
        self.tensors: dict[str, TensorInfo] = {}
        self._buffer = lasting(0)
        index = folder / INDEX_NAME
        if index.exists():
            weight_map = _read_index(index)
            for file_name in dict.fromkeys(weight_map.values()):
                _add_all(self.tensors, _read_header(folder / file_name))
            missing = [name for name, file in weight_map.items() if self._file_name(name) != file]
            if missing:
                raise ModelError(
                    f"{len(missing)} tensors are not where the index says, first {missing[0]!r}", where=str(index)
                )
            self.tensors = {name: info for name, info in self.tensors.items() if name in weight_map}
            return
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError("no .safetensors file", where=str(folder), **_pickle_hint(folder))
        for file in [folder / SINGLE_NAME] if folder / SINGLE_NAME in files else files:
            _add_all(self.tensors, _read_header(file))

    def _file_name(self, name: str) -> str | None:
        return self.tensors[name].file.name if name in self.tensors else None

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of tensor `name`."""
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`."""
        info = self.tensors[name]
        if self._mappings is not None and info.start < info.end and info.start % info.dtype.itemsize == 0:
            if info.file not in self._mappings:
                self._mappings[info.file] = _map_file(info.file)
            return self._mappings[info.file][info.start : info.end].view(info.dtype).view(info.shape)
        data = lasting(info.end - info.start)
        with info.file.open("rb", buffering=0) as file:
            _read_into(data, file, info.start)
        return data.view(info.dtype).view(info.shape)

    def slices(self, name: str, rows: int) -> Iterator[Tensor]:
        """Tensor `name` in turn, `rows` rows at a time; each slice is overwritten by the next one, of any tensor.

        One buffer for all: memory fresh from the system costs several times what reading into it does.
        """
        info = self.tensors[name]
        row = prod(info.shape[1:]) * info.dtype.itemsize
        if self._buffer.nbytes < rows * row:
            self._buffer = lasting(rows * row)
        with info.file.open("rb", buffering=0) as file:
            for start in range(0, info.shape[0], rows):
                count = min(rows, info.shape[0] - start)
                data = self._buffer[: count * row]
                _read_into(data, file, info.start + start * row)
                yield data.view(info.dtype).view(count, *info.shape[1:])


def _pickle_hint(folder: Path) -> dict[str, str]:
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLE_SUFFIXES]
    if not pickles:
        return {"fix": "Give a folder that holds a model's safetensors files"}
    return {
        "why": f"{pickles[0]} is a pickle, which can run code when it is read, and is refused",
        "fix": "Convert it: load it in transformers where you trust it, then save_pretrained() writes safetensors",
    }


def _read_index(path: Path) -> dict[str, str]:
    check_limit("json_bytes", path.stat().st_size, "bytes", path)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ModelError("is not a safetensors index", where=str(path), why=why) from None
    for file in sorted(set(names.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"names {file!r}", where=str(path), why="only .safetensors files beside it are read")
        if not (path.parent / file).is_file():
            raise ModelError("the file is missing", where=str(path.parent / file), why=f"{path.name} names it")
    return names


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, after checking that header and file agree to the byte."""

    def refuse(what: str, why: str = "") -> ModelError:
        return ModelError(what, where=str(path), why=why, fix="Download or write the file again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise refuse("the header does not fit the file", f"it says {length} bytes, the file has {size}")
            check_limit("header_bytes", length, "bytes of header", path)
            text = file.read(length)
    except OSError as error:
        raise read_error(ModelError, path, error) from None
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
        del text
        base, position, infos = 8 + length, 0, {}
        metadata = entries.pop("__metadata__", None)
        if metadata is not None and any(type(text) is not str for text in metadata.values()):
            raise refuse("__metadata__ holds something else than texts")
        check_limit("tensors", len(entries), "tensors", path)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            check_limit("name_bytes", len(name.encode()), f"bytes of name ({name[:40]!r}...)", path)
            check_limit("dims", len(shape), f"dimensions of {name!r}", path)
            if any(type(n) is not int or n < 0 for n in (start, end, *shape)):
                raise refuse(f"tensor {name!r} has a bad shape or offset")
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise refuse(f"tensor {name!r} has dtype {entry['dtype']}", f"supported are {_DTYPES}")
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            if start != position or end - start != prod(shape) * ITEMSIZE[dtype]:
                raise refuse(f"tensor {name!r} does not fill its place", f"bytes {start} to {end}, shape {shape}")
            position = end
            infos[name] = TensorInfo(path, getattr(torch, dtype), shape, base + start, base + end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise refuse("the header is not safetensors'", f"{type(error).__name__}: {error}") from None
    if base + position != size:
        raise refuse(f"the file has {size} bytes, its tensors need {base + position}")
    return infos


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands twice")
    return entries


def _add_all(tensors: dict[str, TensorInfo], more: Mapping[str, TensorInfo]) -> None:
    twice = tensors.keys() & more.keys()
    if twice:
        name = min(twice)
        raise ModelError(f"tensor {name!r} stands in two files", where=str(more[name].file))
    tensors.update(more)


def _map_file(path: Path) -> Tensor:
    with path.open("rb") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def _read_into(data: Tensor, file: FileIO, start: int) -> None:
    """Fill `data` with the bytes of `file` from `start` on."""
    view = data.numpy().data
    file.seek(start)
    while view:
        try:
            count = file.readinto(view)  # one read gives at most 2 GiB
        except OSError as error:
            raise read_error(ModelError, str(file.name), error) from None
        if not count:
            raise ModelError("the file became shorter while it was read", where=str(file.name))
        view = view[count:]
