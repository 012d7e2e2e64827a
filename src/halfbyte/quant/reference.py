"""Quantize and dequantize in plain torch. Slow, and the specification: every kernel is tested against it."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from halfbyte.config.formats import bits_of, constants_of
from halfbyte.quant.absmax import TINY, scales_and_offsets
from halfbyte.quant.blocks import num_blocks
from halfbyte.quant.codebook import codebook
from halfbyte.quant.nibbles import pack_codes, unpack_codes
from halfbyte.quant.offsets import range_constants
from halfbyte.quant.scales import codes_for_scales


def quantize_reference(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of `weight`, block by block over its flat row-major elements.

    Each block is divided by its largest magnitude; a code counts the boundaries strictly below the result, so ties
    go to the lower value. A short last block is divided directly where full ones are multiplied by the reciprocal:
    that is bitsandbytes' arithmetic, and what makes the codes equal.

    Args:
        weight: any shape, float32, bfloat16 or float16, finite.

    Returns:
        codes (num_code_bytes(n, bits),) uint8, absmax (ceil(n/blocksize),) float32; of int4-asym twice as many, for an
        offset follows each scale: the least weight of a block gets the lowest code, the largest the highest.
    """
    if constants_of(quant_type) > 1:
        constants = range_constants(weight, blocksize)
        return codes_for_scales(weight, constants, quant_type, blocksize), constants
    table = codebook(quant_type, blocksize)
    flat = weight.detach().reshape(-1).float()
    full = flat.numel() - flat.numel() % blocksize
    blocks, tail = flat[:full].view(-1, blocksize), flat[full:]
    absmax = blocks.abs().amax(dim=1) if full else flat.new_zeros(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)).reshape(-1)
    if tail.numel():
        # Unlike bitsandbytes the stored scale of an all-zero tail is 0, not 1e-38, so that zeros stay exactly zero.
        tail_absmax = tail.abs().amax()
        absmax = torch.cat([absmax, tail_absmax.unsqueeze(0)])
        scaled = torch.cat([scaled, tail / tail_absmax.clamp(min=TINY)])
    ranks = torch.bucketize(scaled, table.unit_boundaries.to(flat.device), out_int32=True)
    codes = table.order.to(flat.device)[ranks]
    return pack_codes(codes, bits_of(quant_type), table.zero_code), table.scales(absmax)


def dequantize_reference(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: float,
    quant_type: str,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """``codebook[code] * scale``, of int4-asym ``+ offset``, in float32, then one rounding to `dtype`; shape `shape`.

    Args:
        codes: (num_code_bytes(n, bits),) uint8, any view of it.
        absmax: (num_constants(n, blocksize, quant_type),) float32; uint8 under double quantization, when
            `nested_absmax` is given.
    """
    each, offsets = scales_and_offsets(absmax, nested_absmax, nested_offset, quant_type)
    count = prod(shape)
    ranks = unpack_codes(codes.reshape(-1), bits_of(quant_type), count).int()
    values = codebook(quant_type, blocksize).values.to(codes.device)[ranks]
    scales = each.repeat_interleave(blocksize)[:count] if num_blocks(count, blocksize) else each
    values = values * scales
    if offsets is not None:
        values += offsets.repeat_interleave(blocksize)[:count]
    return values.view(shape).to(dtype)
