"""AdamW's update of a page: the arithmetic of `kernels.adamw`, every operation rounded once, in its order."""

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels import adamw
from halfbyte.kernels.device_tables import adamw_tables
from halfbyte.kernels.triton.decode import on_device_of, safe_divisor

BLOCKSIZE: tl.constexpr = tl.constexpr(adamw.BLOCKSIZE)
PER_PROGRAM = 1024
"""Elements of a page with 32-bit moments; with 8-bit ones a program has one block."""


@triton.jit
def update(
    param, grad, moment, moment_sq, beta1, rest1, beta2, rest2, keep, step_size, root_scale, eps
):  # fmt: skip
    """One step; all tensors float32. Launched without fusion: no product and sum may become one operation."""
    moment = moment * beta1 + grad * rest1
    moment_sq = moment_sq * beta2 + grad * rest2 * grad
    change = tl.div_rn(moment * step_size, tl.sqrt_rn(moment_sq) * root_scale + eps)
    return param * keep - change, moment, moment_sq


@triton.jit
def encode(value, boundaries):
    """One block (256,) of float32 -> its codes, how many boundaries lie below value / scale, and the scale."""
    # As integers, magnitudes order as they do as numbers, and a NaN is the greatest.
    largest = tl.max(tl.abs(value).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    divisor = tl.broadcast_to(safe_divisor(largest), (BLOCKSIZE,))
    scaled = value * tl.div_rn(tl.full((BLOCKSIZE,), 1.0, tl.float32), divisor)
    code = tl.zeros((BLOCKSIZE,), tl.int32)
    for bit in tl.static_range(8):
        below = scaled <= tl.load(boundaries + code + ((128 >> bit) - 1))
        code += tl.where(below, 0, 128 >> bit)  # a NaN is below nothing
    return code.to(tl.uint8), largest


@triton.jit
def adamw_32bit_kernel(
    param, grad, moment, moment_sq, count, beta1, rest1, beta2, rest2, keep, step_size, root_scale, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    p, m, v = update(
        tl.load(param + at, mask=inside, other=0.0), tl.load(grad + at, mask=inside, other=0.0).to(tl.float32),
        tl.load(moment + at, mask=inside, other=0.0), tl.load(moment_sq + at, mask=inside, other=0.0),
        beta1, rest1, beta2, rest2, keep, step_size, root_scale, eps,
    )  # fmt: skip
    tl.store(param + at, p, mask=inside)
    tl.store(moment + at, m, mask=inside)
    tl.store(moment_sq + at, v, mask=inside)


@triton.jit
def adamw_8bit_kernel(
    param, grad, codes, absmax, codes_sq, absmax_sq, values, boundaries, values_sq, boundaries_sq, count,
    beta1, rest1, beta2, rest2, keep, step_size, root_scale, eps,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)
    inside = at < count
    m = tl.load(values + tl.load(codes + at, mask=inside, other=0).to(tl.int32)) * tl.load(absmax + block)
    v = tl.load(values_sq + tl.load(codes_sq + at, mask=inside, other=0).to(tl.int32)) * tl.load(absmax_sq + block)
    p, m, v = update(
        tl.load(param + at, mask=inside, other=0.0), tl.load(grad + at, mask=inside, other=0.0).to(tl.float32), m, v,
        beta1, rest1, beta2, rest2, keep, step_size, root_scale, eps,
    )  # fmt: skip
    tl.store(param + at, p, mask=inside)
    # Beyond a short last block there is nothing that its scale may see.
    code, scale = encode(tl.where(inside, m, 0.0), boundaries)
    tl.store(codes + at, code, mask=inside)
    tl.store(absmax + block, scale)
    code, scale = encode(tl.where(inside, v, 0.0), boundaries_sq)
    tl.store(codes_sq + at, code, mask=inside)
    tl.store(absmax_sq + block, scale)


def adamw_(pages: list[tuple[Tensor, ...]], numbers: adamw.Numbers) -> None:
    """`kernels.adamw`'s update in place. A page is param, grad and moments: four tensors, six with 8-bit moments."""
    scalars = (
        numbers.beta1, numbers.rest1, numbers.beta2, numbers.rest2, numbers.keep, numbers.step_size,
        numbers.root_scale, numbers.eps,
    )  # fmt: skip
    for page in pages:
        count = page[0].numel()
        if not count:
            continue
        with on_device_of(page[0]):
            if len(page) == 4:
                adamw_32bit_kernel[(triton.cdiv(count, PER_PROGRAM),)](
                    *page, count, *scalars, BLOCK=PER_PROGRAM, num_warps=4, enable_fp_fusion=False
                )
            else:
                adamw_8bit_kernel[(page[3].numel(),)](
                    *page, *adamw_tables(page[0].device), count, *scalars, num_warps=4, enable_fp_fusion=False
                )
