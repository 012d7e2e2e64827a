"""int8 with a float32 scale for each 64 columns of a row: how embeddings and head are held where that is asked for.

Rows stand by themselves, so that any of them can be looked up. 8.5 bits a weight where rows are multiples of 64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.quant.absmax import expand_absmax
from halfbyte.quant.blocks import INT8_BLOCK, num_blocks

TINY = torch.finfo(torch.float32).tiny
"""The scale of a block of zeros."""


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of 255 even steps from -absmax to absmax of each block.

    Args:
        weight: (rows, cols), floating, finite.

    Returns:
        codes (rows, cols) int8 from -127 to 127, scales (rows, ceil(cols / 64)) float32.
    """
    rows, cols = weight.shape
    blocks = num_blocks(cols, INT8_BLOCK)
    wide = weight.float()
    if missing := blocks * INT8_BLOCK - cols:
        wide = F.pad(wide, (0, missing))
    padded = wide.contiguous().view(rows, blocks, INT8_BLOCK)
    scales = (padded.abs().amax(2) / 127).clamp_(min=TINY) if blocks else padded.new_empty(rows, 0)
    codes = (padded / scales.unsqueeze(2)).round_().to(torch.int8)
    return codes.flatten(1)[:, :cols].contiguous(), scales


def dequantize_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (..., cols) times scales (..., ceil(cols / 64)): a float32 product, rounded once to `dtype`."""
    wide = codes.float()
    whole = codes.shape[-1] // INT8_BLOCK
    wide[..., : whole * INT8_BLOCK].unflatten(-1, (whole, INT8_BLOCK)).mul_(scales[..., :whole, None])
    wide[..., whole * INT8_BLOCK :].mul_(scales[..., whole:])
    return wide.to(dtype)


def int8_rows(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str, blocksize: int,
    cols: int,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """A weight of the format "int8" as `quantize_int8` lays it out, over the same codes; None where it is not so."""
    if quant_type != "int8" or blocksize < INT8_BLOCK or not cols or cols % blocksize:
        return None
    scales = absmax if nested_absmax is None else expand_absmax(absmax, nested_absmax, nested_offset)
    each = scales.repeat_interleave(blocksize // INT8_BLOCK) if blocksize > INT8_BLOCK else scales.contiguous()
    return codes.contiguous().view(torch.int8).view(-1, cols), each.view(-1, cols // INT8_BLOCK)


def check_int8(codes: Tensor, scales: Tensor) -> None:
    """RuntimeError unless `scales` are float32 and those of `codes`, an int8 matrix."""
    shape = (codes.shape[0], num_blocks(codes.shape[-1], INT8_BLOCK))
    torch._check(codes.dtype == torch.int8, lambda: f"scales are for int8, not for {codes.dtype}")
    torch._check(
        scales.dtype == torch.float32 and tuple(scales.shape) == shape,
        lambda: f"int8 needs float32 scales of {shape}, not {scales.dtype} of {tuple(scales.shape)}",
    )
