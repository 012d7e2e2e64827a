"""Geometry of a 4-bit weight: how many blocks, bytes and bits (pure Python; the planner uses it)."""

from __future__ import annotations

from math import prod

NESTED_BLOCKSIZE = 256
"""Scales that share one second-level scale under double quantization."""

INT8_BLOCK = 64
"""Columns of a row in int8 that share a scale."""


def num_blocks(num_weights: int, blocksize: int) -> int:
    """Blocks of a weight of `num_weights` elements; the last one may be short."""
    return -(-num_weights // blocksize)


def num_code_bytes(num_weights: int, bits: int = 4) -> int:
    """Bytes of packed codes, one code after the other, the last byte padded."""
    return -(-num_weights * bits // 8)


def quantized_bytes(shape: tuple[int, ...], blocksize: int, double_quant: bool, bits: int = 4) -> int:
    """Bytes of the codes and scales of a weight of `shape` (tables of codes and scales are shared, not counted)."""
    blocks = num_blocks(prod(shape), blocksize)
    scales = blocks + 4 * num_blocks(blocks, NESTED_BLOCKSIZE) if double_quant else 4 * blocks
    return num_code_bytes(prod(shape), bits) + scales


def bits_per_weight(blocksize: int, double_quant: bool, bits: int = 4) -> float:
    """Bits of a weight in a large layer: 4.127 for blocks of 64 with double quantization, 4.5 without."""
    return bits + (8 / blocksize + 32 / (blocksize * NESTED_BLOCKSIZE) if double_quant else 32 / blocksize)


def slice_rows(shape: tuple[int, ...], blocksize: int, max_elements: int) -> int:
    """Rows of a slice for `quantize_slices`: at most `max_elements` where whole pairs of blocks allow it."""
    row = prod(shape[1:])
    unit = 1
    while unit * row % (2 * blocksize):
        unit *= 2
    return max(max_elements // (unit * row), 1) * unit
