"""The adapters that requests may name: read, checked and laid out before anybody sees them."""

from __future__ import annotations

import hashlib
import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint import Adapter, load_adapter
from halfbyte.checkpoint.adapter import pairs, stored_size
from halfbyte.checkpoint.rows import has_rows
from halfbyte.dtypes import format_bytes
from halfbyte.errors import AdapterError, ResourceError
from halfbyte.serve.sequence import ServedAdapter

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Of an adapter: one part of a path and nothing more."""


@dataclass(frozen=True)
class Room:
    """Memory for adapters.

    Attributes:
        bytes: of all of them, the file of one that is being read included.
        itemsize: bytes of a number of an adapter in memory.
    """

    bytes: int
    itemsize: int


class Adapters:
    """Names and what they stand for; safe from any thread.

    A request keeps what its name stood for when it came: unloading or replacing an adapter changes nothing for it.

    Args:
        base: name of the base without adapter.
        lay_out: an adapter as read -> what the engine computes with; raises AdapterError where it does not fit.
        check: raises AdapterError for an adapter of another base; returns notes.
        folder: from where adapters may be loaded by name while serving; None: from nowhere.
        room: that they must do with; None: any.
    """

    def __init__(
        self, base: str, *, lay_out: Callable[[Adapter], Any], check: Callable[[Adapter], list[str]],
        folder: Path | None = None, room: Room | None = None,
    ) -> None:  # fmt: skip
        self._lay_out, self._check = lay_out, check
        self._folder = folder.resolve() if folder is not None else None
        self._changing, self._room = threading.Lock(), room
        self._in_memory: list[tuple[weakref.ref[Any], int]] = []  # unloaded ones too, while requests use them
        self.most_bytes = 0
        """Most that they took at any time."""
        self.base = base
        self._named = {base: ServedAdapter(base, hashlib.sha256(b"base").digest(), None, int(time.time()))}

    def all(self) -> list[ServedAdapter]:
        """The base first."""
        return list(self._named.values())

    def find(self, name: str) -> ServedAdapter | None:
        return self._named.get(name)

    @property
    def nbytes(self) -> int:
        """Of all that are in memory."""
        return sum(size for alive, size in self._in_memory if alive() is not None)

    def load(self, name: str, folder: Path) -> list[str]:
        """Serve the adapter in `folder` as `name`, in place of what was served so before; notes for the user.

        Raises:
            AdapterError: it is damaged, for another base, or does not fit; nothing has changed then.
            ResourceError: there is no memory for it; nothing has changed.
        """
        if name == self.base or not re.fullmatch(NAME, name):
            raise AdapterError("is no name for an adapter", where=name, fix="Letters, digits, . _ - and not the base")
        with self._changing:
            size = self._check_room(name, folder)
            saved = load_adapter(folder)
            if saved.config.get("use_dora"):
                raise AdapterError("is DoRA, which is not served", where=name, fix="Merge it: halfbyte merge")
            if has_rows(saved.config):
                what = "has trained rows of embedding or head, which are not served"
                raise AdapterError(what, where=name, fix="Merge it: halfbyte merge")
            notes = self._check(saved)
            served = ServedAdapter(name, content_hash(saved), self._lay_out(saved), int(time.time()))
            self._in_memory.append((weakref.ref(served), getattr(served.adapter, "nbytes", size)))
            self._named = {**self._named, name: served}
            self.most_bytes = max(self.most_bytes, self.nbytes)
        return notes

    def _check_room(self, name: str, folder: Path) -> int:
        """Bytes that the adapter in `folder` will take, if there is room for them. Raises ResourceError."""
        self._in_memory = [(alive, size) for alive, size in self._in_memory if alive() is not None]
        numbers, file = stored_size(folder)
        if self._room is None:
            return 4 * numbers
        need, free = numbers * self._room.itemsize, self._room.bytes - self.nbytes
        if need + file > free:
            raise ResourceError(
                f"takes {format_bytes(need + file)} while it is read, {format_bytes(free)} are free", where=name,
                why=f"--memory leaves {format_bytes(self._room.bytes)} for adapters",
                fix="Unload another one, or start with more --memory or fewer --cache-tokens",
            )  # fmt: skip
        return need

    def load_by_name(self, name: str) -> list[str]:
        """`load` from the folder of this name in the allowed one.

        Raises:
            AdapterError: as `load`, or there is none.
        """
        if self._folder is None:
            raise AdapterError("no folder to load adapters from", where=name, fix="Start with --adapter-dir")
        folder = self._folder / name
        # By its real name: a link could lead out, and a file system that ignores case would know one under two names.
        if not re.fullmatch(NAME, name) or folder.is_symlink() or name not in {p.name for p in self._folder.iterdir()}:
            raise AdapterError("there is no such adapter", where=name)
        return self.load(name, folder)

    def unload(self, name: str) -> bool:
        """Whether it was there; the base stays."""
        with self._changing:
            if name == self.base or name not in self._named:
                return False
            self._named = {key: value for key, value in self._named.items() if key != name}
        return True


def content_hash(saved: Adapter) -> bytes:
    """Over all that an adapter computes with: the same one under two names is the same content."""
    digest = hashlib.sha256()
    for name, (lora_A, lora_B, scaling) in sorted(pairs(saved).items()):
        for tensor in (lora_A, lora_B):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {scaling!r} ".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
