"""AdamW (arXiv 1711.05101) on flat pages, with moments in 32 or 8 bits: operators, their meaning, the native kernel.

A page is a run of one parameter's elements with their gradient and moments: contiguous tensors of one length and any
shape. A whole parameter is one page. Cut at multiples of `BLOCKSIZE` it gives the same bytes, since blocks of 8-bit
moments are counted from the start of a page: so the moments may live elsewhere and come page by page.

Every operation below is rounded once to float32, in this order, in the plain-torch default and in the native kernel
alike: they agree to the bit on every instruction set, for any number of threads.
"""

from __future__ import annotations

import ctypes as ct
import math
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.abi import DTYPES, AdamwNumbers, AdamwPage, StateMap
from halfbyte.kernels.registry import cpu_choice, run_native
from halfbyte.quant.absmax import TINY
from halfbyte.quant.blocks import num_blocks
from halfbyte.quant.codebook import dynamic_boundaries, dynamic_map, unsigned_dynamic_boundaries, unsigned_dynamic_map

BLOCKSIZE = 256
"""Elements that share one scale of 8-bit moments."""
FIRST_CELL, LAST_CELL = 0x3400, 0x3F80
"""HB_FIRST_CELL and HB_LAST_CELL of csrc/halfbyte.h: the top 16 bits of the floats 2^-23 and 1."""

_NUMBERS = "float lr, float beta1, float beta2, float eps, float weight_decay, int step"

torch.library.define(
    "halfbyte::adamw_32bit_",
    f"(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, {_NUMBERS}) -> ()",
)
torch.library.define(
    "halfbyte::adamw_8bit_",
    "(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_absmax, "
    f"Tensor(d!)[] exp_avg_sq, Tensor(e!)[] exp_avg_sq_absmax, {_NUMBERS}) -> ()",
)


@dataclass(frozen=True)
class Numbers:
    """What one step multiplies with, computed in double precision; rounded to float32 where it is used."""

    beta1: float
    rest1: float
    beta2: float
    rest2: float
    keep: float
    step_size: float
    root_scale: float
    eps: float

    @classmethod
    def of(cls, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> Numbers:
        """`step` counts from 1."""
        return cls(
            beta1=beta1,
            rest1=1 - beta1,
            beta2=beta2,
            rest2=1 - beta2,
            keep=1 - lr * weight_decay,
            step_size=lr / (1 - beta1**step),
            root_scale=1 / math.sqrt(1 - beta2**step),
            eps=eps,
        )


def _update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, numbers: Numbers) -> None:
    """One step in place: param, exp_avg, exp_avg_sq float32, grad float32 or bfloat16, all (n,)."""
    grad = grad.float()
    exp_avg.mul_(numbers.beta1).add_(grad * numbers.rest1)
    exp_avg_sq.mul_(numbers.beta2).add_((grad * numbers.rest2).mul_(grad))
    root = (
        exp_avg_sq.double().sqrt().float()
    )  # exact: torch's float32 root (MKL's) is an ulp off for one number in six
    denominator = root.mul_(numbers.root_scale).add_(numbers.eps)
    param.mul_(numbers.keep).sub_((exp_avg * numbers.step_size).div_(denominator))


def _decode(codes: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
    """codes (n,) uint8, absmax (ceil(n/256),) float32, values (256,) -> (n,) float32."""
    return values.to(codes.device)[codes.int()] * absmax.repeat_interleave(BLOCKSIZE)[: codes.numel()]


def _encode(x: Tensor, boundaries: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """x (n,) float32 into absmax (ceil(n/256),) and codes (n,): how many boundaries lie below x / absmax."""
    padded = torch.nn.functional.pad(x, (0, absmax.numel() * BLOCKSIZE - x.numel())).view(-1, BLOCKSIZE)
    absmax.copy_(padded.abs().amax(dim=1))
    scaled = (padded * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)).view(-1)[: x.numel()]
    codes.copy_(torch.bucketize(scaled, boundaries.to(x.device), out_int32=True))


def _check(*lists: list[Tensor]) -> None:
    """The operators' lists, in their order: six with 8-bit moments, else four."""
    for number, page in enumerate(zip(*lists, strict=True)):
        count, grad_dtype = page[0].numel(), page[1].dtype
        moment = [(torch.float32, count)]
        if len(lists) == 6:
            moment = [(torch.uint8, count), (torch.float32, num_blocks(count, BLOCKSIZE))]
        for tensor, needed in zip(page, [(torch.float32, count), (grad_dtype, count), *moment, *moment], strict=True):
            if (tensor.dtype, tensor.numel()) != needed or not tensor.is_contiguous():
                found = f"{tensor.numel()} {tensor.dtype}{'' if tensor.is_contiguous() else ', not contiguous,'}"
                raise ValueError(f"page {number}: {found} where {needed[1]} {needed[0]} are needed")
        if grad_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"page {number}: the gradient is {grad_dtype}, not float32 or bfloat16")


def plain_adamw_32bit_(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], *numbers: Any
) -> None:
    _check(param, grad, exp_avg, exp_avg_sq)
    for page in zip(param, grad, exp_avg, exp_avg_sq, strict=True):
        value, gradient, moment, moment_sq = (tensor.view(-1) for tensor in page)
        _update(value, gradient, moment, moment_sq, Numbers.of(*numbers))


def plain_adamw_8bit_(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_absmax: list[Tensor],
    exp_avg_sq: list[Tensor], exp_avg_sq_absmax: list[Tensor], *numbers: Any,
) -> None:  # fmt: skip
    _check(param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax)
    pages = zip(param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, strict=True)
    for page in pages:
        value, gradient, codes, absmax, codes_sq, absmax_sq = (tensor.view(-1) for tensor in page)
        moment = _decode(codes, absmax, dynamic_map())
        moment_sq = _decode(codes_sq, absmax_sq, unsigned_dynamic_map())
        _update(value, gradient, moment, moment_sq, Numbers.of(*numbers))
        _encode(moment, dynamic_boundaries(), codes, absmax)
        _encode(moment_sq, unsigned_dynamic_boundaries(), codes_sq, absmax_sq)


torch.library.impl("halfbyte::adamw_32bit_", "CompositeExplicitAutograd", plain_adamw_32bit_)
torch.library.impl("halfbyte::adamw_8bit_", "CompositeExplicitAutograd", plain_adamw_8bit_)


@torch.library.register_fake("halfbyte::adamw_32bit_")
def _adamw_32bit_fake(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], *numbers: Any
) -> None:
    _check(param, grad, exp_avg, exp_avg_sq)


@torch.library.register_fake("halfbyte::adamw_8bit_")
def _adamw_8bit_fake(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_absmax: list[Tensor],
    exp_avg_sq: list[Tensor], exp_avg_sq_absmax: list[Tensor], *numbers: Any,
) -> None:  # fmt: skip
    _check(param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax)


def _cells(boundaries: Tensor) -> Tensor:
    """`hb_state_map.cells`: where a number's top 16 bits lead to, so that the kernel compares it with one boundary."""
    edges = (torch.arange(FIRST_CELL, LAST_CELL + 2, dtype=torch.int32) << 16).view(torch.float32)
    low, high = edges[:-1].clone(), edges[1:]
    low[0] = 0
    positive = torch.bucketize(low, boundaries)
    negative = torch.bucketize(-high, boundaries, right=True)  # magnitudes below `high`: numbers above `-high`
    return torch.stack([positive, negative]).to(torch.uint8)


@cache
def state_maps() -> tuple[Any, list[Tensor]]:
    """The two maps, signed and unsigned, as the library takes them, and what keeps their memory."""
    maps, kept = [], list[Tensor]()
    for values, boundaries in (
        (dynamic_map(), dynamic_boundaries()),
        (unsigned_dynamic_map(), unsigned_dynamic_boundaries()),
    ):
        tensors = (values, torch.cat([boundaries, torch.tensor([math.inf])]), _cells(boundaries))
        kept.extend(tensors)
        maps.append(StateMap(*(tensor.data_ptr() for tensor in tensors)))
    return (StateMap * 2)(*maps), kept


def _native(lists: tuple[list[Tensor], ...], numbers: tuple[Any, ...]) -> bool:
    """Do the step in the library; False, and nothing done, where it does not serve."""
    if cpu_choice().library is None:
        return False
    _check(*lists)
    pages = []
    for page in zip(*lists, strict=True):
        pointers: list[int | None] = [tensor.data_ptr() for tensor in page]
        if len(pointers) == 4:
            pointers = [*pointers[:3], None, pointers[3], None]
        pages.append(AdamwPage(*pointers, page[0].numel(), DTYPES[page[1].dtype]))
    array, values = (AdamwPage * len(pages))(*pages), AdamwNumbers(*astuple(Numbers.of(*numbers)))
    return run_native("hb_adamw", ct.addressof(values), ct.addressof(array), len(pages), ct.addressof(state_maps()[0]))


@torch.library.impl("halfbyte::adamw_32bit_", "CPU")
def _adamw_32bit_(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], *numbers: Any
) -> None:
    if not _native((param, grad, exp_avg, exp_avg_sq), numbers):
        plain_adamw_32bit_(param, grad, exp_avg, exp_avg_sq, *numbers)


@torch.library.impl("halfbyte::adamw_8bit_", "CPU")
def _adamw_8bit_(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_absmax: list[Tensor],
    exp_avg_sq: list[Tensor], exp_avg_sq_absmax: list[Tensor], *numbers: Any,
) -> None:  # fmt: skip
    lists = (param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax)
    if not _native(lists, numbers):
        plain_adamw_8bit_(*lists, *numbers)
