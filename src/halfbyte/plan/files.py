"""The names, shapes and dtypes of a model's tensors from the headers of its files, without reading a weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from halfbyte.config.gguf_header import read_gguf_header
from halfbyte.config.limits import check_limit
from halfbyte.config.model_config import check_links
from halfbyte.dtypes import ITEMSIZE, SAFETENSORS_DTYPES
from halfbyte.errors import ModelError, ResourceError

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
        ModelError: there is no such thing, or a file of the folder is a link out of it.
        ResourceError: the hub cannot be asked.
    """
    local = Path(path).expanduser()
    if path and local.exists():
        if local.is_dir():
            check_links(local)
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
                check_limit("header_bytes", length, "bytes of header", path)
                header = json.loads(file.read(length))
            tensors |= {
                name: StoredTensor(tuple(map(int, entry["shape"])), SAFETENSORS_DTYPES[entry["dtype"]])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except ModelError:
            raise
        except (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError("the header is not safetensors'", where=str(path), why=str(error)) from None
    return tensors


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The header of a .gguf file: `read_gguf_header`, with what the loader makes of each tensor."""
    fields, tensors = read_gguf_header(path)
    return fields, {
        name: StoredTensor(tensor.shape, _GGUF_16BIT.get(tensor.kind, "bfloat16")) for name, tensor in tensors.items()
    }
