"""Double quantization: the float32 scales of the blocks, held in 8 bits (arXiv 2305.14314 §3)."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.config.formats import constants_of
from halfbyte.quant.blocks import NESTED_BLOCKSIZE, num_blocks
from halfbyte.quant.codebook import dynamic_boundaries, dynamic_map

TINY = 1e-38
"""Stands in for an all-zero block's scale when dividing by it."""


def compress_absmax(absmax: Tensor, constants: int = 1, *, centred: bool = True) -> tuple[Tensor, Tensor, float]:
    """Scales in 8 bits: subtract their mean, then blocks of 256 of the dynamic map.

    Args:
        absmax: (num_blocks,) float32.
        constants: 2 where an offset follows each scale. The mean is of the scales alone and subtracted from them
            alone: they vary little around it, and an offset of 0 stays 0.
        centred: False subtracts nothing: scales of either sign have no mean to speak of, and 256 need no others.

    Returns:
        absmax_codes (num_blocks,) uint8, nested_absmax (ceil(num_blocks/256),) float32, nested_offset.
    """
    offset = absmax[::constants].mean() if centred and absmax.numel() else absmax.new_zeros(())
    rest = absmax - offset
    if constants > 1:
        rest[1::2] = absmax[1::2]
    codes, nested_absmax = torch.ops.halfbyte.quantize_8bit(rest)
    return codes, nested_absmax, float(offset)


def quantize_8bit_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 256 of the dynamic map: a code counts the boundaries strictly below x / absmax.

    Args:
        x: (n,) float32, finite.

    Returns:
        codes (n,) uint8, absmax (ceil(n/256),) float32.
    """
    groups = num_blocks(x.numel(), NESTED_BLOCKSIZE)
    padded = torch.nn.functional.pad(x, (0, groups * NESTED_BLOCKSIZE - x.numel())).view(groups, NESTED_BLOCKSIZE)
    absmax = padded.abs().amax(dim=1) if groups else x.new_zeros(0)
    scaled = padded * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)
    codes = torch.bucketize(scaled.reshape(-1), dynamic_boundaries().to(x.device), out_int32=True)
    return codes[: x.numel()].to(torch.uint8), absmax


def expand_absmax(absmax_codes: Tensor, nested_absmax: Tensor, nested_offset: float, constants: int = 1) -> Tensor:
    """Inverse of `compress_absmax`, to (num_blocks,) float32: a float32 multiply, then a float32 add (no FMA)."""
    values = dynamic_map().to(absmax_codes.device)[absmax_codes.int()]
    groups = torch.arange(absmax_codes.numel(), device=absmax_codes.device) // NESTED_BLOCKSIZE
    products = values * nested_absmax[groups]
    scales = products + torch.tensor(nested_offset, dtype=torch.float32)
    if constants > 1:
        scales[1::2] = products[1::2]
    return scales


def scales_and_offsets(
    absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str
) -> tuple[Tensor, Tensor | None]:
    """What a weight's blocks are decoded with: scales (num_blocks,) float32, and offsets where the format has them."""
    if nested_absmax is not None:
        absmax = expand_absmax(absmax, nested_absmax, nested_offset, constants_of(quant_type))
    return (absmax, None) if constants_of(quant_type) == 1 else (absmax[::2], absmax[1::2])
