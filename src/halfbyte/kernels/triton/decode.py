"""What every kernel shares: bytes of a 4-bit weight -> float32 values, bit for bit as `quant.reference` gives them.

Kernels that decode are launched with ``enable_fp_fusion=False``: ``map[code] * nested_absmax + offset`` is a multiply,
then an add, each rounded. Contracted into one FMA it would differ in the last bit from what every other tool decodes.
Rows and blocks are counted in int64 before they meet a stride: a weight may hold more than 2^31 elements.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant import absmax as scales
from halfbyte.quant import blocks

NESTED_BLOCKSIZE: tl.constexpr = tl.constexpr(blocks.NESTED_BLOCKSIZE)
TINY: tl.constexpr = tl.constexpr(scales.TINY)
LEAST_BLOCKSIZE = 32
"""The kernels handle block sizes that are powers of two from this on."""


def on_device_of(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def parts_of(count: int, size: int) -> int:
    """How many parts of `size` make up `count`, on the host: triton.cdiv takes 10 us there, as much as a launch."""
    return -(-count // size)


def power_of_two(least: int) -> int:
    """The first from `least` on."""
    return 1 << max(least - 1, 0).bit_length()


@triton.jit
def safe_divisor(largest):
    """What a block whose largest magnitude is `largest` is divided by: TINY at least, as the reference has it.

    A block of zeros by 1, which gives the same zeros: Triton 3.3 takes TINY, a subnormal, for 0, and makes them NaN.
    """
    return tl.where(largest == 0.0, 1.0, tl.where(largest < TINY, TINY, largest))


@triton.jit
def _constant(absmax, nested_absmax, dynamic_map, at, mask, NESTED: tl.constexpr):
    """The numbers at `at` (int64) of a weight's scales and offsets; nothing is added to those stored in 8 bits."""
    if NESTED:
        code = tl.load(absmax + at, mask=mask, other=0).to(tl.int32)
        constant = tl.load(dynamic_map + code) * tl.load(nested_absmax + at // NESTED_BLOCKSIZE, mask=mask, other=0.0)
    else:
        constant = tl.load(absmax + at, mask=mask, other=0.0)
    return constant


@triton.jit
def in_blocks(
    values, absmax, nested_absmax, dynamic_map, nested_offset, block, mask, NESTED: tl.constexpr, OFFSETS: tl.constexpr
):
    """values (..., n) times the scales of the blocks `block` (...), int64, plus their offsets; none beyond `mask`."""
    at = block * 2 if OFFSETS else block
    scale = _constant(absmax, nested_absmax, dynamic_map, at, mask, NESTED)
    if NESTED:
        scale += nested_offset
    values *= tl.expand_dims(scale, -1)
    if OFFSETS:
        offset = _constant(absmax, nested_absmax, dynamic_map, at + 1, mask, NESTED)
        values += tl.expand_dims(offset, -1)
    return values


@triton.jit
def code_values(codes, byte, mask, codebook):
    """Codebook values of packed bytes, the high nibble's first: (..., n) int64 indices -> (..., 2n) float32."""
    packed = tl.load(codes + byte, mask=mask, other=0).to(tl.int32)
    return tl.interleave(tl.load(codebook + (packed >> 4)), tl.load(codebook + (packed & 15)))


@triton.jit
def decode_tile(
    codes, absmax, nested_absmax, codebook, dynamic_map, nested_offset, row, col, rows, cols,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows `row` (BLOCK_R,) and columns `col` and on of a (rows, cols) weight: (BLOCK_R, BLOCK_C) float32, 0 beyond.

    `cols` is a multiple of BLOCKSIZE, BLOCK_C and BLOCKSIZE are powers of two and `col` is a multiple of BLOCK_C: so
    a run of min(BLOCKSIZE, BLOCK_C) columns has one scale (and offset), and masks change at even columns only.
    """
    RUN: tl.constexpr = BLOCKSIZE if BLOCKSIZE < BLOCK_C else BLOCK_C
    far_row = row.to(tl.int64)[:, None]
    inside = (row < rows)[:, None]
    run_col = col + tl.arange(0, BLOCK_C // RUN)[None, :] * RUN
    block = far_row * (cols // BLOCKSIZE) + run_col // BLOCKSIZE
    byte_col = col // 2 + tl.arange(0, BLOCK_C // 2)[None, :]
    half = tl.multiple_of(cols // 2, 16)
    mask = inside & (byte_col < half)
    values = code_values(codes, far_row * half + byte_col, mask, codebook)
    values = in_blocks(
        tl.reshape(values, (BLOCK_R, BLOCK_C // RUN, RUN)), absmax, nested_absmax, dynamic_map, nested_offset, block,
        inside & (run_col < cols), NESTED, OFFSETS,
    )  # fmt: skip
    values = tl.reshape(values, (BLOCK_R, BLOCK_C))
    whole = tl.interleave(mask, mask)
    return tl.where(whole, values, 0.0)
