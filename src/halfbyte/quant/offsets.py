"""Scale and offset of each block, where a weight is ``value of its code * scale + offset`` (int4-asym).

They lie in turn: scale and offset of the first block, of the second one, and so on. Values are the integers -8 to 7.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.config.base import QuantConfig
from halfbyte.quant.absmax import TINY
from halfbyte.quant.blocks import num_blocks

LOWEST, STEPS = -8, 15
FACTORS = (0.7, 0.76, 0.82, 0.88, 0.94, 1.0)
"""Candidates: the range that 16 values span, as parts of that of the block's weights."""
ROUNDS = 3
"""Of codes for the best so far, and least squares for these codes."""
FLOOR = 1e-3
"""As in quant/scales.py."""
CHUNK = 1 << 16
"""Weights that are worked on at a time: they and what is made of them fit into a cache."""


def block_constants(weight: Tensor, config: QuantConfig, importance: Tensor | None) -> Tensor:
    """The scales and offsets that `config.scale` asks for; either sign of a scale says the same here."""
    if config.chosen_scale == "absmax":
        return range_constants(weight, config.blocksize)
    return least_error_constants(weight, config.blocksize, importance)


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
        importance: (weight.shape[-1],) float32, at least 0; None: all alike.
    """
    if importance is not None:
        importance = importance.clamp(min=FLOOR * float(importance.mean()) + TINY)
    constants = weight.new_empty(2 * num_blocks(weight.numel(), blocksize), dtype=torch.float32)
    for w, h, found in _chunks(weight, blocksize, importance, constants):
        _best(w, h, found)
    return constants


def _best(w: Tensor, h: Tensor | None, found: Tensor) -> None:
    """Of the blocks w (blocks, size), their columns weighted by `h`, into found (blocks, 2)."""
    least, most = w.aminmax(dim=1, keepdim=True)
    middle, width = least / 2 + most / 2, most / STEPS - least / STEPS
    mass = float(w.shape[1]) if h is None else h.sum(1, keepdim=True)
    mean = (w if h is None else w * h).sum(1, keepdim=True) / mass
    centred = w - mean
    best, scale, offset = torch.full_like(mean, -1.0), torch.zeros_like(mean), mean.clone()

    def offer(step: Tensor, shift: Tensor) -> None:
        """The least squares for the codes that weights would like best of ``step * integer + shift``."""
        nonlocal best, scale, offset
        values = ((w - shift) / step.where(step != 0, 1.0)).round_().clamp_(LOWEST, LOWEST + STEPS)
        centre = (values if h is None else values * h).sum(1, keepdim=True) / mass
        values -= centre
        weighted = values if h is None else values * h
        along = (weighted * centred).sum(1, keepdim=True)
        norm = (weighted * values).sum(1, keepdim=True).clamp(min=TINY)
        gain = along * along / norm  # what the error is less than with the mean for all
        better, fitted = gain > best, along / norm
        best, scale = gain.where(better, best), fitted.where(better, scale)
        offset = (mean - fitted * centre).where(better, offset)

    for factor in FACTORS:
        offer(factor * width, middle + factor / 2 * width)
    for _ in range(ROUNDS):
        offer(scale, offset)
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
