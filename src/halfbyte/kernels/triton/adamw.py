"""AdamW's update of a page: the arithmetic of `kernels.adamw`, every operation rounded once, in its order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels import adamw
from halfbyte.kernels.device_tables import adamw_tables
from halfbyte.kernels.triton.decode import on_device_of, parts_of, safe_divisor

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
def float_pointer(address):
    """An address in a table of such, as float32's."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.float32)), 4)


@triton.jit
def adamw_32bit_kernel(
    table, beta1, rest1, beta2, rest2, keep, step_size, root_scale, eps, GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A part of page number program_id(1), whose row of `table` is its tensors' addresses and how long they are."""
    row = table + tl.program_id(1) * 5
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(row + 4)
    param, moment, moment_sq = float_pointer(row), float_pointer(row + 2), float_pointer(row + 3)
    grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
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
    table, values, boundaries, values_sq, boundaries_sq, beta1, rest1, beta2, rest2, keep, step_size, root_scale, eps,
    GRAD: tl.constexpr,
):  # fmt: skip
    """A block of page number program_id(1), as above."""
    row = table + tl.program_id(1) * 7
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)
    count = tl.load(row + 6)
    inside, some = at < count, block * BLOCKSIZE < count
    param, absmax, absmax_sq = float_pointer(row), float_pointer(row + 3), float_pointer(row + 5)
    grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
    codes = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    codes_sq = tl.load(row + 4).to(tl.pointer_type(tl.uint8))
    m = tl.load(values + tl.load(codes + at, mask=inside, other=0).to(tl.int32))
    v = tl.load(values_sq + tl.load(codes_sq + at, mask=inside, other=0).to(tl.int32))
    p, m, v = update(
        tl.load(param + at, mask=inside, other=0.0), tl.load(grad + at, mask=inside, other=0.0).to(tl.float32),
        m * tl.load(absmax + block, mask=some, other=0.0), v * tl.load(absmax_sq + block, mask=some, other=0.0),
        beta1, rest1, beta2, rest2, keep, step_size, root_scale, eps,
    )  # fmt: skip
    tl.store(param + at, p, mask=inside)
    # Beyond a short last block there is nothing that its scale may see.
    code, scale = encode(tl.where(inside, m, 0.0), boundaries)
    tl.store(codes + at, code, mask=inside)
    tl.store(absmax + block, scale, mask=some)
    code, scale = encode(tl.where(inside, v, 0.0), boundaries_sq)
    tl.store(codes_sq + at, code, mask=inside)
    tl.store(absmax_sq + block, scale, mask=some)


def adamw_(pages: list[tuple[Tensor, ...]], numbers: adamw.Numbers) -> None:
    """`kernels.adamw`'s update in place; a page is param, grad and moments: four tensors, six with 8-bit moments.

    One launch for all pages of a gradient's dtype on a device: a step has hundreds of them.
    """
    scalars = (
        numbers.beta1, numbers.rest1, numbers.beta2, numbers.rest2, numbers.keep, numbers.step_size,
        numbers.root_scale, numbers.eps,
    )  # fmt: skip
    together: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for page in pages:
        if page[0].numel():
            together.setdefault((page[0].device, page[1].dtype), []).append(page)
    for (device, dtype), alike in together.items():
        rows = [[*(tensor.data_ptr() for tensor in page), page[0].numel()] for page in alike]
        table, longest = torch.tensor(rows, dtype=torch.int64).to(device), max(row[-1] for row in rows)
        grad = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
        with on_device_of(table):
            if len(alike[0]) == 4:
                adamw_32bit_kernel[(parts_of(longest, PER_PROGRAM), len(rows))](
                    table, *scalars, GRAD=grad, BLOCK=PER_PROGRAM, num_warps=4, enable_fp_fusion=False
                )
            else:
                adamw_8bit_kernel[(parts_of(longest, BLOCKSIZE.value), len(rows))](
                    table, *adamw_tables(device), *scalars, GRAD=grad, num_warps=4, enable_fp_fusion=False
                )
