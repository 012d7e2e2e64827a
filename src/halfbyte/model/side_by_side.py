"""Text through a model as it should be and as it is being written, layer by layer: what calibration needs to see.

Of all the text only the hidden states between two decoder layers are kept. It goes through a layer in chunks, several
times: for each group of linear layers that have one input (of a Llama's: q, k, v; o; gate, up; down) as far as that
input, whose moments are summed; then the group is written. At last it goes through the whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.kernels.buffers import steady_memory
from halfbyte.model.lent import LentModel, Weights
from halfbyte.quant.absmax import TINY
from halfbyte.quant.error_feedback import Moments
from halfbyte.quant.inverse import add_product

PADDED = 64
"""Sequences are padded to multiples of this, so that the chunks are of few shapes."""
SYMMETRIC = 1024
"""Rows of a symmetric product that are computed together."""

Multiply = Callable[[Tensor], Tensor]
"""x (..., in) by a weight: (..., out)."""
Writer = Callable[[str, Moments], Multiply]
"""Given a parameter's name and its layer's inputs, writes it; returns the product that the text goes on with."""


@steady_memory()
@torch.no_grad()
def run_side_by_side(
    model: LentModel, ids: Tensor, counts: Tensor, weights: Weights, names: Collection[str], writer: Writer,
    *, chunk_tokens: int, capped: bool = False, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Run text through the decoder layers; `writer` gets each weight of `names` when its inputs are known.

    Args:
        ids: (sequences, tokens) int64, padded at the end.
        counts: the same shape: which tokens are text.
        weights: of the model as it should be.
        names: parameters called "<linear layer>.weight". Those that no text passes, row by row in a decoder layer, are
            not given to `writer`.
        chunk_tokens: of text that goes through a layer at a time, in each of the two models.
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
        for layer in layers:
            own_names = [linear.name for group in layer.groups for linear in group]
            with ExitStack() as written:
                for group in layer.groups:
                    with kept.keep(own_names):
                        passes = (input_of(group[0].module, partial(layer, state)) for state in states)
                        moments = _moments(passes, [count for _, count in chunks], capped, dtype)
                    for linear in group:
                        written.enter_context(linear.second_half_by(writer(linear.name, moments), dtype))
                    del moments
                with kept.keep(own_names):
                    for i, state in enumerate(states):
                        states[i] = layer(state)


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
    """A linear layer, and the name of its weight."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self._ours: Tensor | None = None

    @contextmanager
    def second_half_by(self, multiply: Multiply, dtype: torch.dtype) -> Iterator[None]:
        """Inside the block the second half of a batch is multiplied with another weight instead of its own, and both
        in `dtype`.
        """
        with ExitStack() as hooks:
            hooks.callback(self.module.register_forward_pre_hook(partial(self._split, dtype), prepend=True).remove)
            hooks.callback(self.module.register_forward_hook(partial(self._join, multiply), prepend=True).remove)
            yield

    def _split(self, dtype: torch.dtype, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wanted, self._ours = args[0].to(dtype).chunk(2)
        return (wanted, *args[1:])

    def _join(self, multiply: Multiply, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self._ours is not None
        ours, self._ours = self._ours, None
        ours = multiply(ours)
        if isinstance(module.bias, Tensor):
            ours += module.bias
        both = output.new_empty(2 * len(output), *output.shape[1:], dtype=torch.float32)
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


def _moments(passes: Iterator[Tensor], counts: list[Tensor], capped: bool, dtype: torch.dtype) -> Moments:
    """Of the inputs that `passes` gives, chunk by chunk."""
    own = cross = torch.empty(0)
    for both, count in zip(passes, counts, strict=True):
        wanted, ours = (part[count] for part in both.chunk(2))
        if not own.numel():
            own, cross = (torch.zeros(ours.shape[1], ours.shape[1]) for _ in range(2))
        if capped:
            sizes = ours.square().mean(1, keepdim=True).clamp(min=TINY)
            roots = (sizes.median() / sizes).clamp_(max=1.0).sqrt_()
            wanted, ours = wanted * roots, ours * roots
        apart = (wanted - ours).to(dtype)  # before they are rounded: it is a small part of either
        ours = ours.to(dtype)
        turned = ours.T.contiguous()
        for start in range(0, len(own), SYMMETRIC):  # above the diagonal is enough
            add_product(own[start : start + SYMMETRIC, start:], turned[start : start + SYMMETRIC], ours[:, start:])
        add_product(cross, apart.T, ours)
    for start in range(0, len(own), SYMMETRIC):
        stop = start + SYMMETRIC
        own[stop:, start:stop] = own[start:stop, stop:].T
    return Moments(own, cross.add_(own))


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
