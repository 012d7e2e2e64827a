"""Products with a 4-bit weight that is decoded tile by tile in registers: ``x @ W^T`` and ``grad @ W``.

One row of x: a dot product in each program. Up to `tiles.FUSED_ROWS`: tensor-core tiles, float32 sums, cut into parts
where that fills the GPU; which tile is fastest is tried out once for a weight's shape and kept by Triton in its cache.
More rows, and blocks that cross the rows of the weight: `codec.dequantize`, then torch.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.config.formats import constants_of
from halfbyte.kernels.device_tables import device_tables
from halfbyte.kernels.panel import Weight
from halfbyte.kernels.triton.codec import dequantize
from halfbyte.kernels.triton.decode import decode_tile, on_device_of
from halfbyte.kernels.triton.tiles import NUM_STAGES, Tile, Tiling, all_tiles, backward_tiling, forward_tiling, fused

VECTOR_ROWS, VECTOR_DEPTH = 4, 1024
"""Rows and columns of the weight that a program of `vector_kernel` decodes at a time: 16 bytes of codes a thread."""


@triton.jit
def vector_kernel(
    x, codes, absmax, nested_absmax, codebook, dynamic_map, nested_offset, bias, out, rows, cols,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (rows,) = W (rows, cols) @ x (cols,) + bias. Weights are not rounded to x's dtype on the way."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for col in range(0, cols, BLOCK_C):
        weight = decode_tile(
            codes, absmax, nested_absmax, codebook, dynamic_map, nested_offset, row, col, rows, cols,
            BLOCKSIZE, NESTED, OFFSETS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        at = col + tl.arange(0, BLOCK_C)
        value = tl.load(x + at, mask=at < cols, other=0.0).to(tl.float32)
        total = tl.fma(weight, tl.broadcast_to(value[None, :], (BLOCK_R, BLOCK_C)), total)
    result = tl.sum(total, axis=1)
    if BIAS:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def forward_kernel(
    x, codes, absmax, nested_absmax, codebook, dynamic_map, nested_offset, bias, out, m, rows, cols, part,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr, MOST_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[p] (m, rows) = x (m, cols) @ W^T (rows, cols) over columns p * part and on, `part` of them; + bias."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(2) * part
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for col in range(first, min(first + part, cols), BLOCK_K):
        at = col + tl.arange(0, BLOCK_K)
        mask = (line < m)[:, None] & (at < cols)[None, :]
        value = tl.load(x + line.to(tl.int64)[:, None] * cols + at[None, :], mask=mask, other=0.0)
        weight = decode_tile(
            codes, absmax, nested_absmax, codebook, dynamic_map, nested_offset, row, col, rows, cols,
            BLOCKSIZE, NESTED, OFFSETS, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = tl.dot(value, tl.trans(weight.to(value.dtype)), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    far = (tl.program_id(2).to(tl.int64) * m + line)[:, None] * rows + row[None, :]
    tl.store(out + far, total.to(out.dtype.element_ty), mask=(line < m)[:, None] & (row < rows)[None, :])


@triton.jit
def backward_kernel(
    grad, codes, absmax, nested_absmax, codebook, dynamic_map, nested_offset, out, m, rows, cols, part,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr, MOST_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[p] (m, cols) = grad (m, rows) @ W (rows, cols) over rows p * part and on, `part` of them."""
    col = tl.program_id(0) * BLOCK_N
    line = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(2) * part
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, min(first + part, rows), BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        mask = (line < m)[:, None] & (row < rows)[None, :]
        value = tl.load(grad + line.to(tl.int64)[:, None] * rows + row[None, :], mask=mask, other=0.0)
        weight = decode_tile(
            codes, absmax, nested_absmax, codebook, dynamic_map, nested_offset, row, col, rows, cols,
            BLOCKSIZE, NESTED, OFFSETS, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        total = tl.dot(value, weight.to(value.dtype), total, input_precision="ieee")
    at = col + tl.arange(0, BLOCK_N)
    far = (tl.program_id(2).to(tl.int64) * m + line)[:, None] * cols + at[None, :]
    tl.store(out + far, total.to(out.dtype.element_ty), mask=(line < m)[:, None] & (at < cols)[None, :])


@triton.jit
def add_parts_kernel(parts, bias, out, count, columns, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out (count,) = parts[0] + parts[1] + ... + bias of the column, in that order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * count.to(tl.int64) + at, mask=at < count, other=0.0)
    if BIAS:
        total += tl.load(bias + at % columns, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


def _config(tile: Tile) -> triton.Config:
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns}
    return triton.Config(blocks, num_warps=tile.num_warps, num_stages=NUM_STAGES)


def _can_time(x: Tensor) -> bool:
    """Not in the interpreter."""
    return x.device.type == "cuda"


def _tuned(kernel: Any, rows_of: str, tiling: Callable[..., Tiling]) -> Any:
    """`kernel` with the fastest of its tiling's tiles, timed once for a shape of W and kept in Triton's cache folder.

    Args:
        rows_of: the argument whose dtype and device decide.
    """

    def candidates(configs: list[triton.Config], named: dict[str, Any], **constants: Any) -> list[triton.Config]:
        x = named[rows_of]
        wanted = tiling(constants["MOST_ROWS"], named["rows"], named["cols"], x.dtype).tiles
        found = [_config(tile) for tile in wanted]
        return found if _can_time(x) else found[:1]

    tune = triton.autotune(
        [_config(tile) for tile in all_tiles()], key=["rows", "cols", "MOST_ROWS"],
        prune_configs_by={"early_config_prune": candidates}, cache_results=True,
    )  # fmt: skip
    return tune(kernel)


tuned_forward = _tuned(forward_kernel, "x", forward_tiling)
tuned_backward = _tuned(backward_kernel, "grad", backward_tiling)


def linear(x: Tensor, weight: Weight, bias: Tensor | None, out_features: int) -> Tensor:
    """x (m, in_features) @ W^T + bias: (m, out_features), in x's dtype; float32 sums."""
    m, in_features = x.shape
    if in_features % weight[5] or not fused(m, x):
        return torch.nn.functional.linear(x, dequantize(weight, (out_features, in_features), x.dtype), bias)
    x, tensors = x.contiguous(), _pointers(weight)
    out = x.new_empty(m, out_features)
    if not out.numel():
        return out
    if bias is not None:
        bias = bias.contiguous()
    codec = _codec(weight)
    with on_device_of(x):
        if m == 1:
            vector_kernel[(triton.cdiv(out_features, VECTOR_ROWS),)](
                x, *tensors, x if bias is None else bias, out, out_features, in_features, **codec,
                BIAS=bias is not None, BLOCK_R=VECTOR_ROWS,
                BLOCK_C=min(VECTOR_DEPTH, triton.next_power_of_2(in_features)), num_warps=4,
            )  # fmt: skip
            return out
        tiling = forward_tiling(m, out_features, in_features, x.dtype)
        partial = out if tiling.parts == 1 else _room(tiling, out)
        tuned_forward[_grid(m, out_features, tiling)](
            x, *tensors, x if bias is None else bias, partial, m, out_features, in_features,
            _part(tiling, in_features), **codec, BIAS=bias is not None and tiling.parts == 1,
            MOST_ROWS=tiling.most_rows, BLOCK_K=tiling.depth,
        )  # fmt: skip
        if tiling.parts > 1:
            _add_parts(partial, bias, out)
    return out


def linear_dx(grad: Tensor, weight: Weight, in_features: int) -> Tensor:
    """grad (m, out_features) @ W: (m, in_features), in grad's dtype; float32 sums."""
    m, out_features = grad.shape
    if in_features % weight[5] or not fused(m, grad):
        return grad @ dequantize(weight, (out_features, in_features), grad.dtype)
    grad, out = grad.contiguous(), grad.new_empty(m, in_features)
    if not out.numel():
        return out
    tiling = backward_tiling(m, out_features, in_features, grad.dtype)
    with on_device_of(grad):
        partial = out if tiling.parts == 1 else _room(tiling, out)
        tuned_backward[_grid(m, in_features, tiling)](
            grad, *_pointers(weight), partial, m, out_features, in_features, _part(tiling, out_features),
            **_codec(weight), MOST_ROWS=tiling.most_rows, BLOCK_K=tiling.depth,
        )  # fmt: skip
        if tiling.parts > 1:
            _add_parts(partial, None, out)
    return out


def _pointers(weight: Weight) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """What the kernels take for a weight; without double quantization the second scales are never read."""
    codes, absmax, nested_absmax, nested_offset, quant_type, blocksize = weight
    table, dynamic = device_tables(quant_type, blocksize, codes.device)
    second = absmax if nested_absmax is None else nested_absmax
    return codes.contiguous(), absmax.contiguous(), second.contiguous(), table.values, dynamic, nested_offset


def _codec(weight: Weight) -> dict[str, Any]:
    """The constants that decide how a weight is decoded."""
    return {
        "BLOCKSIZE": weight[5], "NESTED": weight[2] is not None, "OFFSETS": constants_of(weight[4]) > 1,
        "enable_fp_fusion": False,
    }  # fmt: skip


def _room(tiling: Tiling, out: Tensor) -> Tensor:
    return out.new_empty(tiling.parts, *out.shape, dtype=torch.float32)


def _part(tiling: Tiling, depth: int) -> int:
    """Length of each part of the sum: whole steps."""
    steps = -(-depth // tiling.depth)
    return -(-steps // tiling.parts) * tiling.depth


def _grid(rows: int, columns: int, tiling: Tiling) -> Callable[[dict[str, int]], tuple[int, int, int]]:
    # The weight's side comes first: there may be 2^31 programs along the first axis, 65,535 along the others.
    return lambda tile: (triton.cdiv(columns, tile["BLOCK_N"]), triton.cdiv(rows, tile["BLOCK_M"]), tiling.parts)


def _add_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    count = out.numel()
    add_parts_kernel[(triton.cdiv(count, 1024),)](
        parts, out if bias is None else bias, out, count, out.shape[1],
        PARTS=parts.shape[0], BIAS=bias is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
