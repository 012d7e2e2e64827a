"""4-bit layers that lend their bytes from a store while they compute, and have none otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

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
        """Have `layer`, a decoder layer as transformers made it, compute `in_memory` whenever it is called."""
        layer.streamed = self  # type: ignore[assignment]
        layer.forward = partial(self._forward, layer, layer.forward)

    def _forward(
        self, layer: nn.Module, plain: Callable[..., Any], hidden_states: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """What autograd would save of a plain layer would be other bytes by the time of the backward pass."""
        if not torch.is_grad_enabled():
            with self.in_memory():
                return plain(hidden_states, *args, **kw)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        return _ComputedAgain.apply(self, lambda x: plain(x, *args, **kw), hidden_states, *trained)  # type: ignore[no-untyped-call]

    def _take_away(self) -> None:
        for linear, (codes, absmax) in zip(self._linears, self._away, strict=True):
            linear.place_bytes(codes, absmax)


class _ComputedAgain(torch.autograd.Function):
    """A streamed layer as transformers wrote it: keeps its input only, and is computed again in the backward pass,
    with the same random numbers, for the gradients of its input and of what is trained."""

    @staticmethod
    def forward(
        ctx: Any, streamed: StreamedLayer, run: Callable[[Tensor], Any], hidden_states: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.streamed, ctx.run, ctx.trained = streamed, run, trained
        ctx.random, (ctx.devices, ctx.states) = torch.get_rng_state(), get_device_states(hidden_states)
        ctx.save_for_backward(hidden_states)
        with streamed.in_memory(turns=True):
            return _only_tensor(run(hidden_states))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        wanted = ctx.needs_input_grad[2]
        x = ctx.saved_tensors[0].detach().requires_grad_(wanted)
        with ctx.streamed.in_memory(backward=True), torch.enable_grad(), torch.random.fork_rng(devices=ctx.devices):
            torch.set_rng_state(ctx.random)
            set_device_states(ctx.devices, ctx.states)
            y = _only_tensor(ctx.run(x))
            inputs = [x, *ctx.trained] if wanted else ctx.trained
            found = torch.autograd.grad(y, inputs, grads[0], allow_unused=True)
        return None, None, *(() if wanted else (None,)), *found


def _only_tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ConfigError(
            "this architecture's layers cannot be trained while they are streamed", where="memory.weights",
            why="they give more than hidden states", fix="Set memory.weights to mmap",
        )  # fmt: skip
    return output
