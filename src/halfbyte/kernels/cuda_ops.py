"""The CUDA implementations of the operators. Importing this module registers them; nothing is loaded before first use.

Which kernels may serve is `registry.cuda_choice`'s word, which comes first is measured (docs/gpu.md): Triton's, but
for a row or two. A case that they do not know (float64, a block size that is no power of two) goes to the next in
line, at last to the plain-torch reference, which runs on the GPU as well.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.config.formats import constants_of
from halfbyte.kernels import adamw
from halfbyte.kernels.panel import Weight
from halfbyte.kernels.registry import cuda_choice
from halfbyte.quant import ops
from halfbyte.quant.reference import dequantize_reference, quantize_reference

BITSANDBYTES_ROWS = 2
"""To so many rows of x, the next tokens of a chat, bitsandbytes' product is the faster one: on an H100 a row of a
14336 x 4096 weight takes it 36 us and Triton 75, two rows 50 and 74, four 72 and 75."""


def _kernels(
    quant_type: str, blocksize: int, dtype: torch.dtype, count: int, *, quantize: bool = False, few_rows: bool = False
) -> Any | None:
    """The module whose kernels serve this case: functions quantize, dequantize, linear, linear_dx; None: torch."""
    names = cuda_choice().kernels
    for name in reversed(names) if few_rows else names:
        if name == "bitsandbytes" and not quantize:
            from halfbyte.kernels import bnb_cuda

            if bnb_cuda.knows(quant_type, blocksize, dtype, count):
                return bnb_cuda
        elif name == "triton":
            from halfbyte.kernels.triton import kernels

            if kernels.knows(quant_type, blocksize, dtype):
                return kernels
    return None


def check_weight(weight: Weight, count: int, like: Tensor) -> None:
    """Kernels read by these numbers and from these addresses: a wrong one must not reach them."""
    codes, absmax, nested_absmax, _, quant_type, blocksize = weight
    ops._check_weight(codes, absmax, nested_absmax, quant_type, blocksize, count)
    for name, tensor in (("codes", codes), ("absmax", absmax), ("nested_absmax", nested_absmax)):
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} on {tensor.device}, the others on {like.device}")


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    kernels = _kernels(quant_type, blocksize, weight.dtype, weight.numel(), quantize=True)
    if kernels is None or constants_of(quant_type) > 1:
        return quantize_reference(weight, quant_type, blocksize)
    result: tuple[Tensor, Tensor] = kernels.quantize(weight, quant_type, blocksize)
    return result


def dequantize_4bit(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str, blocksize: int,
    shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = (codes, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    check_weight(weight, prod(shape), codes)
    return _dequantize(weight, tuple(shape), dtype)


def _dequantize(weight: Weight, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    kernels = _kernels(*weight[4:], dtype, prod(shape))
    if kernels is None:
        return dequantize_reference(*weight, shape, dtype)
    result: Tensor = kernels.dequantize(weight, shape, dtype)
    return result


def dequantize_into(out: Tensor, weight: Weight) -> None:
    """Decode `weight` into `out`, contiguous, of its shape."""
    check_weight(weight, out.numel(), out)
    kernels = _kernels(*weight[4:], out.dtype, out.numel())
    if kernels is None:
        out.copy_(dequantize_reference(*weight, tuple(out.shape), out.dtype))
    else:
        kernels.dequantize(weight, tuple(out.shape), out.dtype, out)


def linear_4bit(
    x: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str,
    blocksize: int, out_features: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    in_features = x.shape[-1]
    weight = (codes, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    check_weight(weight, out_features * in_features, x)
    if bias is not None:
        if bias.shape != (out_features,) or bias.device != x.device:
            raise ValueError(f"bias {tuple(bias.shape)} on {bias.device}, not ({out_features},) on {x.device}")
        bias = bias.to(x.dtype)
    few_rows = x.numel() <= BITSANDBYTES_ROWS * in_features
    kernels = _kernels(quant_type, blocksize, x.dtype, out_features * in_features, few_rows=few_rows)
    if kernels is None or not x.numel():
        return F.linear(x, _dequantize(weight, (out_features, in_features), x.dtype), bias)
    y: Tensor = kernels.linear(x.reshape(-1, in_features), weight, bias, out_features)
    # A result, not a view of one: PEFT's methods add to it in place.
    result: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], out_features])
    return result


def linear_4bit_dx(
    grad: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str,
    blocksize: int, in_features: int,
) -> Tensor:  # fmt: skip
    out_features = grad.shape[-1]
    weight = (codes, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    check_weight(weight, out_features * in_features, grad)
    kernels = _kernels(quant_type, blocksize, grad.dtype, out_features * in_features)
    if kernels is None or not grad.numel():
        return grad @ _dequantize(weight, (out_features, in_features), grad.dtype)
    dx: Tensor = kernels.linear_dx(grad.reshape(-1, out_features), weight, in_features)
    return dx.view(*grad.shape[:-1], in_features)


def _adamw(plain: Callable[..., None], lists: tuple[list[Tensor], ...], numbers: tuple[Any, ...]) -> None:
    pages = list(zip(*lists, strict=True))
    flat = all(tensor.is_contiguous() and tensor.device == page[0].device for page in pages for tensor in page)
    if "triton" not in cuda_choice().kernels or not flat:
        plain(*lists, *numbers)
        return
    from halfbyte.kernels.triton.adamw import adamw_

    adamw._check(*lists)
    adamw_(pages, adamw.Numbers.of(*numbers))


def adamw_32bit_(*arguments: Any) -> None:
    _adamw(adamw.plain_adamw_32bit_, arguments[:4], arguments[4:])


def adamw_8bit_(*arguments: Any) -> None:
    _adamw(adamw.plain_adamw_8bit_, arguments[:6], arguments[6:])


for _operator in (quantize_4bit, dequantize_4bit, linear_4bit, linear_4bit_dx, adamw_32bit_, adamw_8bit_):
    torch.library.impl(f"halfbyte::{_operator.__name__}", "CUDA", _operator)
