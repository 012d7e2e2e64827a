"""The second moments of what two models give a linear layer, summed over text that comes in chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.kernels.buffers import empty
from halfbyte.quant.absmax import TINY
from halfbyte.quant.inverse import add_product, product
from halfbyte.quant.moments import Moments

SYMMETRIC = 1024
"""Rows of a symmetric product that are computed together."""


def input_moments(
    chunks: Iterator[Tensor], counts: list[Tensor], target: Tensor | None, capped: bool, dtype: torch.dtype
) -> Moments:
    """Moments of a layer's inputs, chunk by chunk.

    Args:
        chunks: (2 sequences, tokens, in), those of the wanted model and then ours.
        counts: of each (sequences, tokens): which tokens are text.
        target: (out, in), a weight that all this is for alone; None: for any.
        capped, dtype: as in `halfbyte.model.side_by_side.run_side_by_side`.
    """
    own = drift = torch.empty(0)
    if target is not None:
        target = target.to(dtype).contiguous()
    for both, count in zip(chunks, counts, strict=True):
        wanted, ours = _only(count, both)
        if not own.numel():
            own = torch.zeros(ours.shape[1], ours.shape[1])
            drift = torch.zeros(len(own if target is None else target), ours.shape[1])
        if capped:
            sizes = torch.linalg.vector_norm(ours, dim=1, keepdim=True).clamp_(min=TINY)
            roots = (sizes.median() / sizes).clamp_(max=1.0)
            wanted, ours = wanted.mul_(roots), ours.mul_(roots)
        apart = wanted.sub_(ours).to(dtype)  # before they are rounded: it is a small part of either
        ours = ours.to(dtype)
        turned = _turned(ours)
        for start in range(0, len(own), SYMMETRIC):  # above the diagonal is enough
            add_product(own[start : start + SYMMETRIC, start:], turned[start : start + SYMMETRIC], ours[:, start:])
        add_product(drift, _turned(apart if target is None else product(apart, target)), ours)
    for start in range(0, len(own), SYMMETRIC):
        stop = start + SYMMETRIC
        own[stop:, start:stop] = own[start:stop, stop:].T
    return Moments(own, drift.add_(own)) if target is None else Moments(own, None, drift)


def _only(count: Tensor, both: Tensor) -> list[Tensor]:
    """Of each half of `both` (2 sequences, tokens, in) the tokens that `count` (sequences, tokens): (some, in)."""
    index = count.view(-1).nonzero().view(-1)
    halves = [half.reshape(count.numel(), -1) for half in both.chunk(2)]
    return [torch.index_select(half, 0, index, out=empty((len(index), half.shape[1]), half.dtype)) for half in halves]


def _turned(x: Tensor) -> Tensor:
    """The transpose of a matrix, in one piece."""
    return empty((x.shape[1], x.shape[0]), x.dtype).copy_(x.T)
