"""What a base model is known by: a hash over the names and bytes of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class BaseHash:
    """Hashes each tensor in a thread of its own while the caller reads the next one; holds no more than that one."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._digests: dict[str, Future[bytes]] = {}
        self._last: Future[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def add(self, name: str, *tensors: Tensor | None) -> None:
        """Hash the bytes of `tensors`, which together are the tensor `name`."""
        if self._last is not None:
            self._last.result()
        self._last = self._digests[name] = self._thread.submit(_digest, *tensors)

    def through(self, name: str, slices: Iterable[Tensor]) -> Iterator[Tensor]:
        """`slices`, which together are the tensor `name`; each is hashed by the time the next one is asked for."""
        digest = hashlib.sha256()
        for part in slices:
            update = self._thread.submit(_update, digest, part)
            yield part
            update.result()
        self._digests[name] = self._thread.submit(digest.digest)

    def hexdigest(self) -> str:
        """sha256 over names and digests in the order of the names, whatever order they came in."""
        digests = sorted(self._digests.items())
        return hashlib.sha256(b"".join(name.encode() + b"\0" + d.result() for name, d in digests)).hexdigest()


def _digest(*tensors: Tensor | None) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            _update(digest, tensor)
    return digest.digest()


def _update(digest: hashlib._Hash, tensor: Tensor) -> None:
    if tensor.numel():
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data))
