"""Geometry of a 4-bit weight: how many blocks, bytes and bits (pure Python; the planner uses it)."""

from __future__ import annotations

from math import prod

from halfbyte.config.formats import bits_of, constants_of

NESTED_BLOCKSIZE = 256
"""Scales that share one second-level scale under double quantization."""

INT8_BLOCK = 64
"""Columns of a row in int8 that share a scale."""


def num_blocks(num_weights: int, blocksize: int) -> int:
    """Blocks of a weight of `num_weights` elements; the last one may be short."""
    return -(-num_weights // blocksize)


def num_constants(num_weights: int, blocksize: int, quant_type: str) -> int:
    """Scales of a weight of `num_weights` elements, and offsets where the format has them."""
    return constants_of(quant_type) * num_blocks(num_weights, blocksize)


def num_code_bytes(num_weights: int, bits: int = 4) -> int:
    """Bytes of packed codes, one code after the other, the last byte padded."""
    return -(-num_weights * bits // 8)


def quantized_bytes(shape: tuple[int, ...], blocksize: int, double_quant: bool, quant_type: str = "nf4") -> int:
    """Bytes of the codes and scales of a weight of `shape` (tables of codes and scales are shared, not counted)."""
    constants = num_constants(prod(shape), blocksize, quant_type)
    scales = constants + 4 * num_blocks(constants, NESTED_BLOCKSIZE) if double_quant else 4 * constants
    return num_code_bytes(prod(shape), bits_of(quant_type)) + scales


def bits_per_weight(blocksize: int, double_quant: bool, quant_type: str = "nf4") -> float:
    """Bits of a weight in a large layer: 4.127 for blocks of 64 with double quantization, 4.5 without."""
    each = 8 + 32 / NESTED_BLOCKSIZE if double_quant else 32
    return bits_of(quant_type) + constants_of(quant_type) * each / blocksize


def slice_rows(shape: tuple[int, ...], blocksize: int, max_elements: int) -> int:
    """Rows of a slice for `quantize_slices`: at most `max_elements` where whole pairs of blocks allow it."""
    row = prod(shape[1:])
    unit = 1
    while unit * row % (2 * blocksize):
        unit *= 2
    return max(max_elements // (unit * row), 1) * unit
