"""The adapters that requests may name: read, checked and laid out before anybody sees them."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint import Adapter, load_adapter
from halfbyte.checkpoint.adapter import pairs
from halfbyte.errors import AdapterError
from halfbyte.serve.sequence import ServedAdapter

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Of an adapter: one part of a path and nothing more."""


class Adapters:
    """Names and what they stand for; safe from any thread.

    A request keeps what its name stood for when it came: unloading or replacing an adapter changes nothing for it.

    Args:
        base: name of the base without adapter.
        lay_out: an adapter as read -> what the engine computes with; raises AdapterError where it does not fit.
        check: raises AdapterError for an adapter of another base; returns notes.
        folder: from where adapters may be loaded by name while serving; None: from nowhere.
    """

    def __init__(
        self, base: str, *, lay_out: Callable[[Adapter], Any], check: Callable[[Adapter], list[str]],
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        self._lay_out, self._check = lay_out, check
        self._folder = folder.resolve() if folder is not None else None
        self._changing = threading.Lock()
        self.base = base
        self._named = {base: ServedAdapter(base, hashlib.sha256(b"base").digest(), None, int(time.time()))}

    def all(self) -> list[ServedAdapter]:
        """The base first."""
        return list(self._named.values())

    def find(self, name: str) -> ServedAdapter | None:
        return self._named.get(name)

    def load(self, name: str, folder: Path) -> list[str]:
        """Serve the adapter in `folder` as `name`, in place of what was served so before; notes for the user.

        Raises:
            AdapterError: it is damaged, for another base, or does not fit; nothing has changed then.
        """
        if name == self.base or not re.fullmatch(NAME, name):
            raise AdapterError("is no name for an adapter", where=name, fix="Letters, digits, . _ - and not the base")
        with self._changing:
            saved = load_adapter(folder)
            notes = self._check(saved)
            served = ServedAdapter(name, content_hash(saved), self._lay_out(saved), int(time.time()))
            self._named = {**self._named, name: served}
        return notes

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
