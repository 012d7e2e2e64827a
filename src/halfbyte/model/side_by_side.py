"""Text through a model as it should be and as it is being written, layer by layer: what calibration needs to see."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from halfbyte.model.lent import LentModel, Weights
from halfbyte.quant.error_feedback import Moments

Writer = Callable[[str, Moments], Tensor]
"""Given a parameter's name and its layer's inputs, writes it; the weight (out, in) that the text goes on with."""


def run_side_by_side(
    model: LentModel, ids: Tensor, counts: Tensor, weights: Weights, names: Collection[str], writer: Writer
) -> None:
    """Run text through all but the head; `writer` gets each weight of `names` when its inputs are known.

    Args:
        ids: (sequences, tokens) int64, padded at the end.
        counts: the same shape: which tokens are text.
        weights: of the model as it should be.
        names: parameters called "<linear layer>.weight". Those that no text passes are not given to `writer`.
    """
    pair = _Pair(counts, writer)
    with ExitStack() as hooks:
        for name, module in model.model.named_modules():
            if f"{name}.weight" in names:
                hooks.callback(module.register_forward_hook(partial(pair.after, f"{name}.weight")).remove)
        model.hidden(torch.cat([ids, ids]), weights)


class _Pair:
    """One batch, its first half the wanted model's and its second the written one's."""

    def __init__(self, counts: Tensor, writer: Writer) -> None:
        self._counts, self._writer = counts, writer
        self._input: Tensor | None = None
        self._moments: Moments | None = None

    @torch.no_grad()
    def after(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output, its second half by the weight that was written."""
        weight = self._writer(name, self._moments_of(args[0]))
        bias = module.bias if isinstance(module.bias, Tensor) else None
        half = nn.functional.linear(args[0].chunk(2)[1], weight, bias)
        return torch.cat([output.chunk(2)[0], half])

    def _moments_of(self, x: Tensor) -> Moments:
        """Of the input `x`; made once where several layers have the same one."""
        if self._moments is None or x is not self._input:
            self._input = self._moments = None  # before the next are made
            wanted, ours = (part[self._counts] for part in x.chunk(2))
            self._moments = Moments(ours.T @ ours, wanted.T @ ours)
            self._input = x
        return self._moments
