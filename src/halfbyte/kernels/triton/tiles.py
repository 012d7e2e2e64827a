"""Tile sizes and thresholds by shape, and which of a few tiles are tried out on the GPU that is there.

The thresholds for halves are measured on an H100 (benchmarks/results/cuda.json, docs/gpu.md); sizes are arithmetic.
The aims: enough programs and bytes in flight to keep a GPU's memory busy at few rows; 64 KB of shared memory at most,
which every GPU since Turing has. How a sum is cut depends on the shapes alone; the tiles that are tried differ in
rows, columns and warps, not in the order of the sum nor in the kind of instruction (on Hopper tiles of 64 rows or more
get another).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

FUSED_ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}
"""Up to this many rows of x the fused tile serves; above, decoding once and torch's product. Each tile of rows decodes
the weight again. Measured in bfloat16: to 64 rows 0.6 to 1.0 of the other's time, with 128 rows about as long, with
256 half as long again. Float32 is not measured: without tensor cores cuBLAS should multiply better."""

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
        num_warps: of 32 threads.
    """

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class Tiling:
    """How a product is cut.

    Attributes:
        most_rows: up to how many rows of x it is meant for, and the name under which a choice of tiles is kept.
        depth: of the sum, per step.
        tiles: what is tried; the first where nothing can be timed.
        parts: the sum is cut into so many, each a program of its own; their results are added in order.
    """

    most_rows: int
    depth: int
    tiles: tuple[Tile, ...]
    parts: int = 1


_FORWARD = {
    2: (
        Tiling(16, 256, (Tile(16, 32, 4), Tile(16, 16, 4), Tile(16, 64, 4))),
        Tiling(64, 64, (Tile(64, 64, 4), Tile(64, 32, 4), Tile(64, 64, 8), Tile(64, 128, 8))),
    ),
    4: (Tiling(16, 64, (Tile(16, 32, 4), Tile(16, 64, 4))),),
}
"""Bytes of an element -> tilings, for more and more rows of x; the last one also serves all larger numbers."""
_BACKWARD = {
    2: (
        Tiling(16, 64, (Tile(16, 64, 4), Tile(16, 32, 4), Tile(16, 128, 4))),
        Tiling(64, 64, (Tile(64, 64, 4), Tile(64, 64, 8), Tile(64, 128, 8))),
    ),
    4: (Tiling(16, 32, (Tile(16, 64, 4), Tile(16, 32, 4))),),
}


def fused(rows: int, x: torch.Tensor) -> bool:
    """Does a product that decodes in registers serve `rows` rows of the dtype and on the device of `x`?"""
    if rows > 1 and x.device.type == "cuda" and torch.version.cuda is not None:
        return rows <= FUSED_ROWS[x.dtype] and torch.cuda.get_device_capability(x.device) >= LEAST_CAPABILITY
    return rows <= FUSED_ROWS[x.dtype]


def forward_tiling(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> Tiling:
    """For ``x @ W^T``, x (rows, in_features)."""
    return _fill(_choose(_FORWARD[dtype.itemsize], rows), rows, out_features, in_features)


def backward_tiling(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> Tiling:
    """For ``grad @ W``, grad (rows, out_features)."""
    return _fill(_choose(_BACKWARD[dtype.itemsize], rows), rows, in_features, out_features)


def all_tiles() -> list[Tile]:
    """Every tile that some product may take, each once."""
    tables = (*_FORWARD.values(), *_BACKWARD.values())
    return list(dict.fromkeys(tile for table in tables for tiling in table for tile in tiling.tiles))


def _choose(tilings: Sequence[Tiling], rows: int) -> Tiling:
    return next((tiling for tiling in tilings if rows <= tiling.most_rows), tilings[-1])


def _fill(tiling: Tiling, rows: int, columns: int, depth: int) -> Tiling:
    """Cut the sum until the first tile gives `PROGRAMS` programs, but leave each part four steps at least."""
    first = tiling.tiles[0]
    programs = -(-rows // first.rows) * -(-columns // first.columns)
    parts = min(-(-PROGRAMS // programs), max(depth // (4 * tiling.depth), 1))
    return replace(tiling, parts=parts)
