"""The operators: one schema each, a fake, and the plain-torch default; `kernels` registers faster ones under them.

A quantized weight travels as flat tensors and numbers, so that torch.compile sees plain schema types.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.config.formats import bits_of
from halfbyte.quant.absmax import quantize_8bit_reference
from halfbyte.quant.blocks import NESTED_BLOCKSIZE, num_blocks, num_code_bytes, num_constants
from halfbyte.quant.choose import choose_codes_reference, improve_codes_reference
from halfbyte.quant.reference import dequantize_reference, quantize_reference
from halfbyte.quant.scales import codes_for_scales_reference, least_error_scales_reference

_WEIGHT = "Tensor codes, Tensor absmax, Tensor? nested_absmax, float nested_offset, str quant_type, int blocksize"

torch.library.define("halfbyte::quantize_4bit", "(Tensor weight, str quant_type, int blocksize) -> (Tensor, Tensor)")
torch.library.define("halfbyte::quantize_8bit", "(Tensor x) -> (Tensor, Tensor)")
torch.library.define(
    "halfbyte::least_error_scales",
    "(Tensor weight, str quant_type, int blocksize, bool signed, Tensor? importance) -> Tensor",
)
torch.library.define(
    "halfbyte::codes_for_scales", "(Tensor weight, Tensor scales, str quant_type, int blocksize) -> Tensor"
)
torch.library.define(
    "halfbyte::choose_codes",
    "(Tensor state, Tensor scales, Tensor factor, Tensor levels) -> (Tensor, Tensor)",
)
torch.library.define(
    "halfbyte::improve_codes_",
    "(Tensor(a!) ranks, Tensor(b!) values, Tensor(c!) pull, Tensor scales, Tensor moments, Tensor levels) -> ()",
)
torch.library.define("halfbyte::product", "(Tensor a, Tensor b) -> Tensor")
torch.library.define("halfbyte::add_product_", "(Tensor(a!) sums, Tensor a, Tensor b, float alpha=1.0) -> ()")
torch.library.define("halfbyte::dequantize_4bit", f"({_WEIGHT}, int[] shape, ScalarType dtype) -> Tensor")
torch.library.define("halfbyte::linear_4bit", f"(Tensor x, {_WEIGHT}, int out_features, Tensor? bias) -> Tensor")
torch.library.define("halfbyte::linear_4bit_dx", f"(Tensor grad, {_WEIGHT}, int in_features) -> Tensor")


def require(condition: bool, message: Callable[[], str]) -> None:
    """As torch._check, which takes 4 us where nothing is wrong: as long as a small product, a dozen times a layer.

    Raises:
        RuntimeError: it is not so.
    """
    if not condition:
        torch._check(False, message)


def _check_weight(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, quant_type: str, blocksize: int, count: int
) -> None:
    require(codes.dtype == torch.uint8, lambda: f"codes must be uint8, not {codes.dtype}")
    require(
        codes.numel() == num_code_bytes(count, bits_of(quant_type)),
        lambda: f"{codes.numel()} code bytes for {count} weights",
    )
    scale_dtype = torch.float32 if nested_absmax is None else torch.uint8
    require(absmax.dtype == scale_dtype, lambda: f"absmax must be {scale_dtype}, not {absmax.dtype}")
    require(
        absmax.numel() == num_constants(count, blocksize, quant_type),
        lambda: f"{absmax.numel()} scales for {count} weights",
    )
    if nested_absmax is not None:
        require(
            nested_absmax.numel() == num_blocks(absmax.numel(), NESTED_BLOCKSIZE),
            lambda: f"{nested_absmax.numel()} second-level scales for {absmax.numel()} scales",
        )


@torch.library.impl("halfbyte::quantize_4bit", "CompositeExplicitAutograd")
def _quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    return quantize_reference(weight, quant_type, blocksize)


@torch.library.register_fake("halfbyte::quantize_4bit")
def _quantize_4bit_fake(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    torch._check(weight.is_floating_point(), lambda: f"cannot quantize {weight.dtype}")
    codes = weight.new_empty(num_code_bytes(weight.numel(), bits_of(quant_type)), dtype=torch.uint8)
    return codes, weight.new_empty(num_constants(weight.numel(), blocksize, quant_type), dtype=torch.float32)


torch.library.impl("halfbyte::quantize_8bit", "CompositeExplicitAutograd", quantize_8bit_reference)


@torch.library.register_fake("halfbyte::quantize_8bit")
def _quantize_8bit_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(num_blocks(x.numel(), NESTED_BLOCKSIZE))


torch.library.impl("halfbyte::least_error_scales", "CompositeExplicitAutograd", least_error_scales_reference)


@torch.library.register_fake("halfbyte::least_error_scales")
def _least_error_scales_fake(
    weight: Tensor, quant_type: str, blocksize: int, signed: bool, importance: Tensor | None
) -> Tensor:
    return weight.new_empty(num_constants(weight.numel(), blocksize, quant_type), dtype=torch.float32)


torch.library.impl("halfbyte::codes_for_scales", "CompositeExplicitAutograd", codes_for_scales_reference)


@torch.library.register_fake("halfbyte::codes_for_scales")
def _codes_for_scales_fake(weight: Tensor, scales: Tensor, quant_type: str, blocksize: int) -> Tensor:
    return weight.new_empty(num_code_bytes(weight.numel(), bits_of(quant_type)), dtype=torch.uint8)


torch.library.impl("halfbyte::choose_codes", "CompositeExplicitAutograd", choose_codes_reference)


@torch.library.register_fake("halfbyte::choose_codes")
def _choose_codes_fake(state: Tensor, scales: Tensor, factor: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(state, dtype=torch.uint8), torch.empty_like(state)


torch.library.impl("halfbyte::improve_codes_", "CompositeExplicitAutograd", improve_codes_reference)


@torch.library.register_fake("halfbyte::improve_codes_")
def _improve_codes_fake(
    ranks: Tensor, values: Tensor, pull: Tensor, scales: Tensor, moments: Tensor, levels: Tensor
) -> None:
    return None


@torch.library.impl("halfbyte::product", "CompositeExplicitAutograd")
def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) b^T (k, n) -> (m, n), float32: the shape in which our kernels multiply, twice as fast as torch's."""
    return a @ b.T


@torch.library.register_fake("halfbyte::product")
def _product_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(len(a), len(b))


@torch.library.impl("halfbyte::add_product_", "CompositeExplicitAutograd")
def _add_product(sums: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """sums (m, n) += alpha a (m, k) b (k, n): float32 sums of two matrices of one dtype."""
    sums.addmm_(a.to(sums.dtype), b.to(sums.dtype), alpha=alpha)


@torch.library.register_fake("halfbyte::add_product_")
def _add_product_fake(sums: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    return None


@torch.library.impl("halfbyte::dequantize_4bit", "CompositeExplicitAutograd")
def _dequantize_4bit(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str, blocksize: int,
    shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check_weight(codes, absmax, nested_absmax, quant_type, blocksize, prod(shape))
    return dequantize_reference(
        codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, tuple(shape), dtype
    )


@torch.library.register_fake("halfbyte::dequantize_4bit")
def _dequantize_4bit_fake(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str, blocksize: int,
    shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check_weight(codes, absmax, nested_absmax, quant_type, blocksize, prod(shape))
    return codes.new_empty(shape, dtype=dtype)


@torch.library.impl("halfbyte::linear_4bit", "CompositeExplicitAutograd")
def _linear_4bit(
    x: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str,
    blocksize: int, out_features: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    weight = torch.ops.halfbyte.dequantize_4bit(
        codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, [out_features, x.shape[-1]], x.dtype
    )
    return F.linear(x, weight, bias)


@torch.library.register_fake("halfbyte::linear_4bit")
def _linear_4bit_fake(
    x: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str,
    blocksize: int, out_features: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    _check_weight(codes, absmax, nested_absmax, quant_type, blocksize, out_features * x.shape[-1])
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.impl("halfbyte::linear_4bit_dx", "CompositeExplicitAutograd")
def _linear_4bit_dx(
    grad: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str,
    blocksize: int, in_features: int,
) -> Tensor:  # fmt: skip
    weight = torch.ops.halfbyte.dequantize_4bit(
        codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, [grad.shape[-1], in_features], grad.dtype
    )
    result: Tensor = grad @ weight
    return result


@torch.library.register_fake("halfbyte::linear_4bit_dx")
def _linear_4bit_dx_fake(
    grad: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str,
    blocksize: int, in_features: int,
) -> Tensor:  # fmt: skip
    _check_weight(codes, absmax, nested_absmax, quant_type, blocksize, in_features * grad.shape[-1])
    return grad.new_empty((*grad.shape[:-1], in_features))


def _save_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the 4-bit weight, never its decoded values: that is what makes it QLoRA."""
    x, codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, _, bias = inputs
    ctx.save_for_backward(codes, absmax, nested_absmax)
    ctx.numbers = (nested_offset, quant_type, blocksize)
    ctx.in_features = x.shape[-1]
    ctx.bias_dims = list(range(x.dim() - 1)) if bias is not None else None


def _linear_4bit_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.halfbyte.linear_4bit_dx(grad, *ctx.saved_tensors, *ctx.numbers, ctx.in_features)
    if ctx.needs_input_grad[8]:
        grad_bias = grad.sum(ctx.bias_dims) if ctx.bias_dims else grad
    return grad_x, None, None, None, None, None, None, None, grad_bias


torch.library.register_autograd("halfbyte::linear_4bit", _linear_4bit_backward, setup_context=_save_codes)
