"""Scale and offset of each block, where a weight is ``value of its code * scale + offset`` (int4-asym).

They lie in turn: scale and offset of the first block, of the second one, and so on. Values are the integers -8 to 7.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.quant.absmax import TINY
from halfbyte.quant.blocks import num_blocks

LOWEST, STEPS = -8, 15
_SPANS = [(0.68 + 0.06 * span, 0.1 + 0.2 * place) for span in range(6) for place in range(5)]
RANGES = tuple((span / STEPS, place * (1 - span) - LOWEST * span / STEPS) for span, place in [*_SPANS, (1.0, 0.5)])
"""Candidates: scale, and offset less the least weight, as parts of the width between a block's least and largest
weight; 16 values that span so much of it, in so many places."""
LEAST_WIDTH = 1e-36
"""A block less wide is taken for one of equal weights."""
CHUNK = 1 << 16
"""Weights that are worked on at a time: they and what is made of them fit into a cache."""


def range_constants(weight: Tensor, blocksize: int) -> Tensor:
    """(2 ceil(n/blocksize),) float32: so that a block's least weight is -8 and its largest 7 times the scale + offset.

    Not finite where the weight is not; 0 and 0 for a block of zeros.
    """
    constants = weight.new_empty(2 * num_blocks(weight.numel(), blocksize), dtype=torch.float32)
    for w, _, found in _chunks(weight, blocksize, None, constants):
        least, most = w.aminmax(dim=1)
        found[:, 0] = most / STEPS - least / STEPS
        found[:, 1] = least - LOWEST * found[:, 0]
    return constants


def least_error_constants(weight: Tensor, blocksize: int, importance: Tensor | None = None) -> Tensor:
    """The same numbers, of least sum over a block of ``importance * (weight - what it is decoded to)^2``.

    Args:
        importance: (weight.shape[-1],) float32, above 0; None: all alike.
    """
    constants = weight.new_empty(2 * num_blocks(weight.numel(), blocksize), dtype=torch.float32)
    for w, h, found in _chunks(weight, blocksize, importance, constants):
        _best(w, h, found)
    return constants


def _best(w: Tensor, h: Tensor | None, found: Tensor) -> None:
    """Of the blocks w (blocks, size), their columns weighted by `h`, into found (blocks, 2)."""
    least, most = w.aminmax(dim=1, keepdim=True)
    width, mass = most - least, float(w.shape[1]) if h is None else h.sum(1, keepdim=True)
    mean = (w if h is None else w * h).sum(1, keepdim=True) / mass
    centred, flat = w - mean, width < LEAST_WIDTH
    best, scale, offset = torch.full_like(mean, -1.0), torch.zeros_like(mean), least.clone()
    for step, shift in RANGES:
        values = (w - least - shift * width) / (step * width).where(~flat, 1.0)
        values = values.round_().clamp_(LOWEST, LOWEST + STEPS)
        centre = (values if h is None else values * h).sum(1, keepdim=True) / mass
        values -= centre
        weighted = values if h is None else values * h
        along = (weighted * centred).sum(1, keepdim=True)
        fitted = along / (weighted * values).sum(1, keepdim=True).clamp(min=TINY)
        gain = along * fitted  # what the error is less than with the mean for all
        better = (gain > best) & ~flat
        best, scale = gain.where(better, best), fitted.where(better, scale)
        offset = (mean - fitted * centre).where(better, offset)
    finite = width.isfinite()
    found[:, 0:1], found[:, 1:2] = scale.where(finite, width), offset.where(finite, width)


def _chunks(
    weight: Tensor, blocksize: int, importance: Tensor | None, constants: Tensor
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Blocks (k, size) float32, their columns' importance, the place of their constants (k, 2); a short one last."""
    flat, places = weight.detach().reshape(-1), constants.view(-1, 2)
    full = flat.numel() // blocksize * blocksize
    step = max(CHUNK // blocksize, 1) * blocksize
    bounds = [(start, min(start + step, full)) for start in range(0, full, step)]
    for start, stop in bounds + ([(full, flat.numel())] if full < flat.numel() else []):
        size = min(blocksize, stop - start)
        h = None
        if importance is not None:
            h = importance[torch.arange(start, stop, device=flat.device) % len(importance)].view(-1, size)
        yield flat[start:stop].float().view(-1, size), h, places[start // blocksize : -(-stop // blocksize)]
