"""AdamW (arXiv 1711.05101) on flat pages, with moments in 32 or 8 bits: operators, their meaning, the native kernel.

A page is a run of one parameter's elements with their gradient and moments: 1-D tensors of one length, wherever they
lie. A whole parameter is one page. Cut at multiples of `BLOCKSIZE` it gives the same bytes, since blocks of 8-bit
moments are counted from the start of a page: so the moments may live elsewhere and come page by page.

Every operation below is rounded once to float32, in this order, in the plain-torch default and in the native kernel
alike: they agree to the bit on every instruction set, for any number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.quant.absmax import TINY
from halfbyte.quant.blocks import num_blocks
from halfbyte.quant.codebook import dynamic_boundaries, dynamic_map, unsigned_dynamic_boundaries, unsigned_dynamic_map

BLOCKSIZE = 256
"""Elements that share one scale of 8-bit moments."""

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
    denominator = exp_avg_sq.sqrt().mul_(numbers.root_scale).add_(numbers.eps)
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
        needed = [(torch.float32, count), (grad_dtype, count)]
        if len(lists) == 6:
            needed += [(torch.uint8, count), (torch.float32, num_blocks(count, BLOCKSIZE))] * 2
        else:
            needed += [(torch.float32, count)] * 2
        for tensor, (dtype, size) in zip(page, needed, strict=True):
            if tensor.dtype != dtype or tensor.shape != (size,):
                raise ValueError(
                    f"page {number}: {tensor.dtype} {tuple(tensor.shape)} where {dtype} ({size},) is needed"
                )
        if grad_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"page {number}: the gradient is {grad_dtype}, not float32 or bfloat16")


def plain_adamw_32bit_(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], *numbers: Any
) -> None:
    _check(param, grad, exp_avg, exp_avg_sq)
    for page in zip(param, grad, exp_avg, exp_avg_sq, strict=True):
        _update(*page, Numbers.of(*numbers))


def plain_adamw_8bit_(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_absmax: list[Tensor],
    exp_avg_sq: list[Tensor], exp_avg_sq_absmax: list[Tensor], *numbers: Any,
) -> None:  # fmt: skip
    _check(param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax)
    pages = zip(param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, strict=True)
    for value, gradient, codes, absmax, codes_sq, absmax_sq in pages:
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
