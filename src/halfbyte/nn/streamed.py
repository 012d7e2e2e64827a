"""4-bit layers that lend their bytes from a store while they compute, and have none otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfbyte.errors import ConfigError
from halfbyte.nn.linear4bit import Linear4bit


class Store(Protocol):
    """What holds the bytes: `store.LayerStore`."""

    def use(self, layer: int, *, backward: bool = False, turns: bool = False) -> AbstractContextManager[list[Tensor]]:
        """The tensors of `layer`, uint8, valid inside the block."""
        ...


class StreamedLayer:
    """The 4-bit linear layers of one decoder layer; their codes and scales are there inside `in_memory` only.

    Between uses the layers hold empty tensors, so that a use outside fails and cannot read bytes of another layer.

    Args:
        store: gives codes and scales of each of `linears`, in turn.
        index: of the layer in the store.
        linears: already complete but for these bytes.
    """

    def __init__(self, store: Store, index: int, linears: Sequence[Linear4bit]) -> None:
        self._store, self._index, self._linears = store, index, tuple(linears)
        self._away = [(linear.codes.new_empty(0), linear.absmax.new_empty(0)) for linear in linears]
        self._open: list[AbstractContextManager[None]] = []
        self._take_away()

    @contextmanager
    def in_memory(self, *, backward: bool = False, turns: bool = False) -> Iterator[None]:
        """Inside the block the layers compute as any other.

        Args:
            backward: whether a backward pass is going on.
            turns: whether a backward pass will follow this forward one. Both decide what is read ahead.
        """
        with self._store.use(self._index, backward=backward, turns=turns) as tensors:
            for linear, codes, absmax in zip(self._linears, tensors[::2], tensors[1::2], strict=True):
                linear.place_bytes(codes, absmax.view(linear.absmax.dtype))
            try:
                yield
            finally:
                self._take_away()

    def move_to(self, store: Store) -> None:
        """Borrow from `store` from now on, which has the same layers in the same order."""
        self._store = store

    def attach(self, layer: nn.Module) -> None:
        """Have `layer`, a decoder layer as transformers made it, enter `in_memory` on every call without gradients."""
        layer.streamed = self  # type: ignore[assignment]
        layer.register_forward_pre_hook(self.before_forward)
        layer.register_forward_hook(self.after_forward, always_call=True)

    def before_forward(self, layer: nn.Module, args: Any) -> None:
        """Hook of the plain layer: what it saves for a backward pass would be other bytes by then."""
        if torch.is_grad_enabled():
            raise ConfigError(
                "this model's layers cannot be trained while they are streamed", where="memory.weights",
                why="only decoder layers that run as one function each can be", fix="Set memory.weights to mmap",
            )  # fmt: skip
        block = self.in_memory()
        block.__enter__()
        self._open.append(block)

    def after_forward(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Hook of the plain layer, called also when its forward failed."""
        if self._open:
            self._open.pop().__exit__(None, None, None)

    def _take_away(self) -> None:
        for linear, (codes, absmax) in zip(self._linears, self._away, strict=True):
            linear.place_bytes(codes, absmax)
