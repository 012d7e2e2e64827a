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
from typing import cast

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


def update_reference(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, numbers: Numbers) -> None:
    """One step in place: param, exp_avg, exp_avg_sq float32, grad float32 or bfloat16, all (n,)."""
    grad = grad.float()
    exp_avg.mul_(numbers.beta1).add_(grad * numbers.rest1)
    exp_avg_sq.mul_(numbers.beta2).add_((grad * numbers.rest2).mul_(grad))
    denominator = exp_avg_sq.sqrt().mul_(numbers.root_scale).add_(numbers.eps)
    param.mul_(numbers.keep).sub_((exp_avg * numbers.step_size).div_(denominator))


def decode_reference(codes: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
    """codes (n,) uint8, absmax (ceil(n/256),) float32, values (256,) -> (n,) float32."""
    return values.to(codes.device)[codes.int()] * absmax.repeat_interleave(BLOCKSIZE)[: codes.numel()]


def encode_reference(x: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """x (n,) float32 -> codes (n,) uint8: how many of the 255 boundaries lie below x / absmax; absmax (ceil(n/256),)."""
    blocks = num_blocks(x.numel(), BLOCKSIZE)
    padded = torch.nn.functional.pad(x, (0, blocks * BLOCKSIZE - x.numel())).view(blocks, BLOCKSIZE)
    absmax = padded.abs().amax(dim=1) if blocks else x.new_zeros(0)
    scaled = (padded * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)).view(-1)[: x.numel()]
    return torch.bucketize(scaled, boundaries.to(x.device), out_int32=True).to(torch.uint8), absmax


def _check(param: list[Tensor], grad: list[Tensor], moments: list[list[Tensor]], absmax: list[list[Tensor]]) -> None:
    for tensors in (grad, *moments, *absmax):
        torch._check(len(tensors) == len(param), lambda: f"lists of {len(tensors)} and {len(param)} pages")
    state_dtype = torch.uint8 if absmax else torch.float32
    for i, page in enumerate(param):
        count = page.numel()
        expected = [(page, torch.float32, count), (grad[i], grad[i].dtype, count)]
        expected += [(tensors[i], state_dtype, count) for tensors in moments]
        expected += [(tensors[i], torch.float32, num_blocks(count, BLOCKSIZE)) for tensors in absmax]
        for tensor, dtype, size in expected:
            torch._check(
                tensor.dim() == 1 and tensor.numel() == size and tensor.dtype == dtype,
                lambda: f"page {i}: {tensor.dtype} {tuple(tensor.shape)} where {dtype} ({size},) is needed",
            )
        torch._check(
            grad[i].dtype in (torch.float32, torch.bfloat16),
            lambda: f"page {i}: the gradient is {grad[i].dtype}, not float32 or bfloat16",
        )


@torch.library.impl("halfbyte::adamw_32bit_", "CompositeExplicitAutograd")
def _adamw_32bit_(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    _check(param, grad, [exp_avg, exp_avg_sq], [])
    numbers = Numbers.of(lr, beta1, beta2, eps, weight_decay, step)
    for page in zip(param, grad, exp_avg, exp_avg_sq, strict=True):
        update_reference(*page, numbers)


@torch.library.impl("halfbyte::adamw_8bit_", "CompositeExplicitAutograd")
def _adamw_8bit_(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_absmax: list[Tensor],
    exp_avg_sq: list[Tensor], exp_avg_sq_absmax: list[Tensor],
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    _check(param, grad, [exp_avg, exp_avg_sq], [exp_avg_absmax, exp_avg_sq_absmax])
    numbers = Numbers.of(lr, beta1, beta2, eps, weight_decay, step)
    pages = zip(param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, strict=True)
    for value, gradient, codes1, absmax1, codes2, absmax2 in pages:
        moment1 = decode_reference(codes1, absmax1, dynamic_map())
        moment2 = decode_reference(codes2, absmax2, unsigned_dynamic_map())
        update_reference(value, gradient, moment1, moment2, numbers)
        for moment, bounds, codes, absmax in (
            (moment1, dynamic_boundaries(), codes1, absmax1),
            (moment2, unsigned_dynamic_boundaries(), codes2, absmax2),
        ):
            new_codes, new_absmax = encode_reference(moment, bounds)
            codes.copy_(new_codes)
            absmax.copy_(new_absmax)


@torch.library.register_fake("halfbyte::adamw_32bit_")
def _adamw_32bit_fake(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    _check(param, grad, [exp_avg, exp_avg_sq], [])


@torch.library.register_fake("halfbyte::adamw_8bit_")
def _adamw_8bit_fake(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_absmax: list[Tensor],
    exp_avg_sq: list[Tensor], exp_avg_sq_absmax: list[Tensor],
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    _check(param, grad, [exp_avg, exp_avg_sq], [exp_avg_absmax, exp_avg_sq_absmax])
