"""Quantize and dequantize: one pass over memory each, any shape, whole blocks or not."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.config.formats import constants_of
from halfbyte.kernels.device_tables import device_tables
from halfbyte.kernels.panel import Weight
from halfbyte.kernels.triton.decode import code_values, in_blocks, on_device_of, parts_of, safe_divisor
from halfbyte.quant.blocks import num_blocks, num_code_bytes

RUN: tl.constexpr = tl.constexpr(32)
"""Weights decoded with one scale: the least block size, which divides all others."""
RUNS_PER_PROGRAM = 32
"""4 bytes of codes a thread: loads and 16-bit stores of a warp are whole cache lines."""
QUANTIZED_PER_PROGRAM = 4096
"""Weights: at least one block of any size."""


@triton.jit
def decode_part(
    codes, absmax, nested_absmax, codebook, dynamic_map, nested_offset, out, count, num_bytes, part,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """out[i] = codebook[code i] * scale of its block + its offset, for the RUNS * 32 elements of part `part`."""
    run = part.to(tl.int64) * RUNS + tl.arange(0, RUNS)
    byte = run[:, None] * (RUN // 2) + tl.arange(0, RUN // 2)[None, :]
    values = in_blocks(
        code_values(codes, byte, byte < num_bytes, codebook), absmax, nested_absmax, dynamic_map, nested_offset,
        run * RUN // BLOCKSIZE, run * RUN < count, NESTED, OFFSETS,
    )  # fmt: skip
    element = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(out + element, values.to(out.dtype.element_ty), mask=element < count)


@triton.jit
def dequantize_kernel(
    codes, absmax, nested_absmax, codebook, dynamic_map, nested_offset, out, count, num_bytes,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """A weight's part."""
    decode_part(
        codes, absmax, nested_absmax, codebook, dynamic_map, nested_offset, out, count, num_bytes, tl.program_id(0),
        BLOCKSIZE, NESTED, OFFSETS, RUNS,
    )  # fmt: skip


@triton.jit
def quantize_kernel(
    weight, boundaries, order, codes, absmax, count, num_bytes, zero_code,
    BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`quant.reference.quantize_reference` of BLOCKS blocks: a short last one is divided, full ones are multiplied."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    value = tl.load(weight + element, mask=element < count, other=0.0).to(tl.float32)
    # As integers, magnitudes order as they do as numbers, and a NaN is the greatest: it must show in the scale.
    largest = tl.max(tl.abs(value).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + block, largest, mask=block * BLOCKSIZE < count)

    divisor = safe_divisor(largest)[:, None]
    one = tl.full((BLOCKS, 1), 1.0, tl.float32)
    full = (block + 1) * BLOCKSIZE <= count
    exact = tl.div_rn(value, tl.broadcast_to(divisor, (BLOCKS, BLOCKSIZE)))
    scaled = tl.where(full[:, None], value * tl.div_rn(one, divisor), exact)
    rank = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    for index in tl.static_range(15):
        rank += (scaled > tl.load(boundaries + index)).to(tl.int32)
    code = tl.where(element < count, tl.load(order + rank).to(tl.int32), zero_code)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(codes + byte, ((high << 4) | low).to(tl.uint8), mask=byte < num_bytes)


def dequantize(weight: Weight, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`quant.reference.dequantize_reference`, bit for bit; into `out` if given, contiguous."""
    codes, absmax, nested_absmax, nested_offset, quant_type, blocksize = weight
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    count = prod(shape)
    if count:
        table, dynamic = device_tables(quant_type, blocksize, codes.device)
        with on_device_of(codes):
            dequantize_kernel[(parts_of(count, RUNS_PER_PROGRAM * RUN.value),)](
                codes.contiguous(), absmax.contiguous(),
                absmax if nested_absmax is None else nested_absmax.contiguous(),
                table.values, dynamic, nested_offset, out, count, codes.numel(),
                BLOCKSIZE=blocksize, NESTED=nested_absmax is not None, OFFSETS=constants_of(quant_type) > 1,
                RUNS=RUNS_PER_PROGRAM,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def quantize(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """`quant.reference.quantize_reference`, bit for bit: codes (ceil(n/2),) uint8, absmax (ceil(n/blocksize),)."""
    flat = weight.detach().contiguous()
    count = flat.numel()
    codes = torch.empty(num_code_bytes(count), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(num_blocks(count, blocksize), dtype=torch.float32, device=flat.device)
    if count:
        table, _ = device_tables(quant_type, blocksize, flat.device)
        per_program = max(QUANTIZED_PER_PROGRAM // blocksize, 1)
        with on_device_of(flat):
            quantize_kernel[(parts_of(absmax.numel(), per_program),)](
                flat, table.unit_boundaries, table.order, codes, absmax, count, codes.numel(), table.zero_code,
                BLOCKSIZE=blocksize, BLOCKS=per_program, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
        absmax = table.scales(absmax)
    return codes, absmax
