"""Text through a model as it should be and as it is being written, layer by layer: what calibration needs to see.

Of all the text only the hidden states between two decoder layers are kept. It goes through a layer in chunks, each
of which waits before every group of linear layers that have one input (of a Llama's: q, k, v; o; gate, up; down) until
that input's moments are summed and the group is written. A chunk that has no room to wait begins anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import ModelError
from halfbyte.kernels.buffers import empty, release_unused, steady_memory, trim_heap
from halfbyte.model.input_moments import input_moments
from halfbyte.model.lent import LentModel, Weights
from halfbyte.quant.moments import Moments

PADDED = 64
"""Sequences are padded to multiples of this, so that the chunks are of few shapes."""

Multiply = Callable[[Tensor], Tensor]
"""x (..., in) by a weight: (..., out)."""
Writer = Callable[[str, Moments], Multiply]
"""Given a parameter's name and its layer's inputs, writes it; returns the product that the text goes on with."""


@steady_memory()
@torch.no_grad()
def run_side_by_side(
    model: LentModel, ids: Tensor, counts: Tensor, weights: Weights, names: Collection[str], writer: Writer,
    *, chunk_tokens: int, waiting_tokens: int = 0, capped: bool = False, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Run text through the decoder layers; `writer` gets each weight of `names` when its inputs are known.

    Args:
        ids: (sequences, tokens) int64, padded at the end.
        counts: the same shape: which tokens are text.
        weights: of the model as it should be.
        names: parameters called "<linear layer>.weight". Those that no text passes, row by row in a decoder layer, are
            not given to `writer`.
        chunk_tokens: of text that goes through a layer at a time, in each of the two models.
        waiting_tokens: of text that may wait inside a layer (`halfbyte.plan.merging.waiting_bytes`): those of the rest
            begin it again for each group.
        capped: let no token's input count for more than the median one's of its chunk. A few tokens, the first of each
            text above all, have inputs a hundred times as large: their outputs would be kept at all others' cost.
        dtype: of matrix products' operands; everything else, and all sums, are in float32.

    Raises:
        ModelError: the model has no list of decoder layers, or they are given more of the text than hidden states.
    """
    chunks, kept = list(_chunks(ids, counts, chunk_tokens)), KeptWeights(weights)
    with model.lend(kept):
        layers = traced_layers(model, [pair for pair, _ in chunks], names)
        states = [input_of(layers[0].module, partial(model.run, pair)) for pair, _ in chunks]
        sizes = accumulate(count.numel() for _, count in chunks)
        waits = [size <= waiting_tokens for size in sizes]
        for layer in layers:
            own_names = [linear.name for group in layer.groups for linear in group]
            with layer.stopping(dtype):
                can_wait = layer.can_wait()
                passes = [_Pass(layer, state, can_wait and wait) for state, wait in zip(states, waits, strict=True)]
                for group in layer.groups:
                    with kept.keep(own_names):
                        inputs, target = (one.go_on() for one in passes), _target_of_few(group, kept)
                        moments = input_moments(inputs, [count for _, count in chunks], target, capped, dtype)
                        del target
                    trim_heap()  # small tensors that wait leave holes in it
                    release_unused()  # what the chunks took; writing needs its own
                    for linear in group:
                        linear.written = writer(linear.name, moments)
                    del moments
                with kept.keep(own_names):
                    for i, one in enumerate(passes):
                        states[i] = one.go_on()


def padded_tokens(ids: Tensor, counts: Tensor, chunk_tokens: int) -> int:
    """Of the text of `run_side_by_side`, as it goes through a layer: with its chunks' padding."""
    return sum(count.numel() for _, count in _chunks(ids, counts, chunk_tokens))


class KeptWeights:
    """`weights`, of which some are read once and kept for a while: a layer's, while chunks go through it."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._read: dict[str, Tensor | None] = {}

    @contextmanager
    def keep(self, names: Iterable[str]) -> Iterator[None]:
        """Inside the block these."""
        self._read = dict.fromkeys(names)
        try:
            yield
        finally:
            self._read = {}

    @contextmanager
    def replaced(self, others: dict[str, Tensor]) -> Iterator[None]:
        """Inside the block these have other values; they are kept ones."""
        before = {name: self._read[name] for name in others}
        self._read.update(others)
        try:
            yield
        finally:
            self._read.update(before)

    def __call__(self, name: str) -> Tensor:
        if name not in self._read:
            return self._weights(name)
        found = self._read[name]
        if found is None:
            found = self._read[name] = self._weights(name)
        return found


def _chunks(ids: Tensor, counts: Tensor, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of `tokens` tokens or one sequence, in few shapes: the ids, twice, and which of them are text."""
    lengths = -(-counts.sum(1) // PADDED) * PADDED
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().view(-1)
        size = min(max(tokens // length, 1), len(rows))
        fill = (0, max(length - ids.shape[1], 0), 0, -len(rows) % size)
        parts = [nn.functional.pad(of[rows, :length], fill).split(size) for of in (ids, counts)]
        for some, count in zip(*parts, strict=True):
            yield some.repeat(2, 1), count


class _Linear:
    """A linear layer, and the name of its weight.

    Attributes:
        written: the product with what was written as its weight; None: nothing yet.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.written: Multiply | None = None
        self._ours: Tensor | None = None

    @contextmanager
    def stopping(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside the block a pass that comes here waits until the layer is `written`. Then the second half of a batch
        is multiplied with that, the first with its own weight, and both in `dtype`.
        """
        with ExitStack() as hooks:
            hooks.callback(self.module.register_forward_pre_hook(partial(self._split, dtype), prepend=True).remove)
            hooks.callback(self.module.register_forward_hook(self._join, prepend=True).remove)
            try:
                yield
            finally:
                self.written = None

    def _split(self, dtype: torch.dtype, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.written is None:
            around = getcurrent().parent
            assert around is not None
            around.switch(args[0])
        wanted, self._ours = args[0].to(dtype).chunk(2)
        return (wanted, *args[1:])

    def _join(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self._ours is not None
        assert self.written is not None
        ours, self._ours = self._ours, None
        ours = self.written(ours)
        if isinstance(module.bias, Tensor):
            ours += module.bias
        both = empty((2 * len(output), *output.shape[1:]), torch.float32)
        both[: len(output)], both[len(output) :] = output, ours
        return both


@dataclass
class _Layer:
    """A decoder layer, what chunks of each shape are accompanied by, and its linear layers by their inputs."""

    module: nn.Module
    calls: dict[torch.Size, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    groups: list[list[_Linear]] = field(default_factory=list)

    def __call__(self, states: Tensor) -> Tensor:
        args, kwargs = self.calls[states.shape[:2]]
        output = self.module(states, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @contextmanager
    def stopping(self, dtype: torch.dtype) -> Iterator[None]:
        """`_Linear.stopping` of all linear layers."""
        with ExitStack() as linears:
            for group in self.groups:
                for linear in group:
                    linears.enter_context(linear.stopping(dtype))
            yield

    def can_wait(self) -> bool:
        """Whether several passes may be inside: not where a module around linear layers has parameters itself, which
        it is lent for one pass.
        """
        linears = {linear.module for group in self.groups for linear in group}
        around = (module for module in self.module.modules() if linears & {*module.modules()} - {module})
        return all(next(module.parameters(recurse=False), None) is None for module in around)


class _Pass:
    """A chunk on its way through a layer.

    Args:
        states: what the layer is given.
        waits: where it stops; otherwise it comes there anew.
    """

    def __init__(self, layer: _Layer, states: Tensor, waits: bool) -> None:
        self._layer, self._states, self._waits = layer, states, waits
        self._running: greenlet | None = None

    def go_on(self) -> Tensor:
        """To the next linear layer that is not written, whose input it returns, or to the end: the layer's output."""
        running, self._running = self._running or greenlet(partial(self._layer, self._states)), None
        found: Tensor = running.switch()
        if not running.dead:
            if self._waits:
                self._running = running
            else:
                running.throw()
        return found


def _target_of_few(group: list[_Linear], weights: Weights) -> Tensor | None:
    """The weight (out, in) of a group of one linear layer that has half as many outputs as inputs, or fewer."""
    if len(group) > 1:
        return None
    weight = weights(group[0].name)
    if isinstance(group[0].module, Conv1D):
        weight = weight.T
    return weight if 2 * weight.shape[0] <= weight.shape[1] else None


class _Reached(BaseException):
    """The rest of a pass is not needed."""


def input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What `module` is given first when `run` runs it; the pass ends there."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    hook = module.register_forward_pre_hook(stop, prepend=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0]


def traced_layers(model: LentModel, chunks: list[Tensor], names: Collection[str]) -> list[_Layer]:
    """The decoder layers as passes of `chunks` find them: one of each shape, and one more to see that nothing but the
    hidden states depends on the text.
    """
    layers = [_Layer(module) for module in model.decoder_layers()]
    linears = {model.model.get_submodule(name.removesuffix(".weight")): name for name in names}
    before: list[Tensor] = []

    def note_call(layer: _Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before.clear()
        call = (args[1:], kwargs)
        if not _same(layer.calls.setdefault(args[0].shape[:2], call), call):
            raise ModelError(
                "cannot be run layer by layer", where=model.label, why="layers are given more of the text than states"
            )

    def note_linear(layer: _Layer, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, known = args[0], [linear.module for group in layer.groups for linear in group]
        if module in known or x.dim() < 3 or x.shape[:2] not in layer.calls:
            return
        if not before or before[0] is not x:
            before[:] = [x]
            layer.groups.append([])
        layer.groups[-1].append(_Linear(linears[module], module))

    with ExitStack() as hooks:
        for layer in layers:
            note = partial(note_call, layer)
            hooks.callback(layer.module.register_forward_pre_hook(note, with_kwargs=True).remove)
            for module in filter(linears.__contains__, layer.module.modules()):
                hooks.callback(module.register_forward_pre_hook(partial(note_linear, layer)).remove)
        of_shape = {chunk.shape: chunk for chunk in reversed(chunks)}
        for chunk in (*of_shape.values(), chunks[-1]):
            model.run(chunk)
    return layers


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of tuples, lists, dicts, tensors and plain values are equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
