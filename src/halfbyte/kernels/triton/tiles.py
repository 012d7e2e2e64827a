"""Tile sizes and thresholds by shape: a small table in place of autotuning, which costs minutes in a first step.

Every number is arithmetic, none is measured: no GPU has run these kernels yet (docs/gpu.md). The aims: enough
programs and bytes in flight to keep a GPU's memory busy at few rows; 64 KB of shared memory at most, which every GPU
since Turing has; a sum's order that depends on the shapes alone, so that a result is the same on every GPU.
"""

from dataclasses import dataclass, replace

import torch

FUSED_ROWS = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 16}
"""Up to this many rows of x the fused tile serves; above, decoding once and torch's product. Each tile of rows
decodes the weight again, and float32 without tensor cores is what cuBLAS does better."""

LEAST_CAPABILITY = (8, 0)
"""Older GPUs get no tensor-core code from Triton: the tiles would multiply one number at a time, and spill."""

PROGRAMS = 512
"""Programs wanted for a product: about four for each multiprocessor of a large GPU."""

NUM_STAGES = 1
"""No software pipelining: Triton's would copy each looked-up codebook value to shared memory by itself, 4 bytes at a
time (seen in the PTX). Several programs on a multiprocessor hide the latency instead."""


@dataclass(frozen=True)
class Tile:
    """A program's part of a product.

    Attributes:
        rows: of x (or of the gradient) and the result; 16 at least, the tensor cores' tile.
        columns: of the result.
        depth: of the sum, per step.
        num_warps: of 32 threads.
        parts: the sum is cut into so many, each a program of its own; their results are added in order.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    parts: int = 1


_FORWARD = {
    2: {16: Tile(16, 32, 256, 4), 64: Tile(64, 64, 64, 4), 128: Tile(128, 64, 64, 8)},
    4: {16: Tile(16, 32, 64, 4)},
}
"""Bytes of an element -> most rows of x -> tile; the last one also serves all larger numbers of rows."""
_BACKWARD = {
    2: {16: Tile(16, 64, 64, 4), 64: Tile(64, 64, 64, 4), 128: Tile(128, 64, 64, 8)},
    4: {16: Tile(16, 64, 32, 4)},
}


def fused(rows: int, x: torch.Tensor) -> bool:
    """Does a product that decodes in registers serve `rows` rows of the dtype and on the device of `x`?"""
    if rows > 1 and x.device.type == "cuda" and torch.version.cuda is not None:
        return rows <= FUSED_ROWS[x.dtype] and torch.cuda.get_device_capability(x.device) >= LEAST_CAPABILITY
    return rows <= FUSED_ROWS[x.dtype]


def forward_tile(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> Tile:
    """For ``x @ W^T``, x (rows, in_features)."""
    return _fill(_choose(_FORWARD[dtype.itemsize], rows), rows, out_features, in_features)


def backward_tile(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> Tile:
    """For ``grad @ W``, grad (rows, out_features)."""
    return _fill(_choose(_BACKWARD[dtype.itemsize], rows), rows, in_features, out_features)


def _choose(tiles: dict[int, Tile], rows: int) -> Tile:
    return next((tile for most, tile in tiles.items() if rows <= most), list(tiles.values())[-1])


def _fill(tile: Tile, rows: int, columns: int, depth: int) -> Tile:
    """Cut the sum until there are `PROGRAMS` programs, but leave each part four steps at least."""
    programs = -(-rows // tile.rows) * -(-columns // tile.columns)
    parts = min(-(-PROGRAMS // programs), max(depth // (4 * tile.depth), 1))
    return replace(tile, parts=parts)
