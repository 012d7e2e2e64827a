"""The CPU implementations of the operators. Importing this module registers them; nothing is loaded before first use.

Each one falls back when the library does not serve or does not know the case: to the reference for the codec, to
panels (decode some rows, multiply, repeat) for the matrix products, so that no path holds a whole decoded weight.
"""

from __future__ import annotations

import ctypes as ct
from math import prod

import torch
from torch import Tensor

from halfbyte.config.formats import bits_of, constants_of
from halfbyte.kernels import panel
from halfbyte.kernels.abi import DTYPES, NO_MEMORY
from halfbyte.kernels.adamw import state_maps
from halfbyte.kernels.buffers import empty
from halfbyte.kernels.cpu import LEAST_BLOCKSIZE, Library, WeightView
from halfbyte.kernels.crossover import panels_serve
from halfbyte.kernels.frozen_linear import dx_into, linear_into
from halfbyte.kernels.group import GroupView, Member
from halfbyte.kernels.registry import cpu_choice, run_native
from halfbyte.quant.absmax import quantize_8bit_reference
from halfbyte.quant.blocks import NESTED_BLOCKSIZE, num_blocks, num_constants
from halfbyte.quant.choose import MOST, choose_codes_reference, improve_codes_reference
from halfbyte.quant.codebook import codebook
from halfbyte.quant.int8 import int8_rows
from halfbyte.quant.offsets import RANGES
from halfbyte.quant.reference import dequantize_reference, quantize_reference
from halfbyte.quant.scales import codes_for_scales_reference, factors_of, least_error_scales_reference


def _library(dtype: torch.dtype, blocksize: int) -> Library | None:
    """The native library, when it knows this case."""
    power_of_two = blocksize >= LEAST_BLOCKSIZE and blocksize & (blocksize - 1) == 0
    return cpu_choice().library if dtype in DTYPES and power_of_two else None


def fused_library(x: Tensor, quant_type: str, blocksize: int, in_features: int) -> Library | None:
    """The native library, when its fused products know this case and are the fastest way."""
    library = _library(x.dtype, blocksize)
    if library is None or not library.fused_linear or in_features % blocksize or not x.numel():
        return None
    if bits_of(quant_type) != 4:
        return None
    return None if panels_serve(x, library) else library


def panel_library(x: Tensor, quant_type: str, blocksize: int) -> Library | None:
    """The native library, when products with x are fastest in the panels that it decodes, or there is no other way."""
    library = _library(x.dtype, blocksize)
    if library is None or not library.fused_linear:
        return None
    only = bits_of(quant_type) != 4 and panel.native(x.dtype, library)
    return library if only or panels_serve(x, library) else None


@torch.library.impl("halfbyte::quantize_4bit", "CPU")
def _quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    library = _library(weight.dtype, blocksize)
    if library is None or bits_of(quant_type) != 4 or constants_of(quant_type) > 1:
        return quantize_reference(weight, quant_type, blocksize)
    return library.quantize(weight, quant_type, blocksize)


@torch.library.impl("halfbyte::quantize_8bit", "CPU")
def _quantize_8bit(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    if x.dtype != torch.float32:
        return quantize_8bit_reference(x)
    codes, absmax = torch.empty_like(x, dtype=torch.uint8), x.new_empty(num_blocks(x.numel(), NESTED_BLOCKSIZE))
    signed = ct.addressof(state_maps()[0])
    if run_native("hb_quantize_8bit", x.data_ptr(), x.numel(), signed, codes.data_ptr(), absmax.data_ptr()):
        return codes, absmax
    return quantize_8bit_reference(x)


@torch.library.impl("halfbyte::least_error_scales", "CPU")
def _least_error_scales(
    weight: Tensor, quant_type: str, blocksize: int, signed: bool, importance: Tensor | None
) -> Tensor:
    flat, table = weight.detach().contiguous(), codebook(quant_type, blocksize)
    scales = flat.new_empty(num_constants(flat.numel(), blocksize, quant_type), dtype=torch.float32)
    name, candidates, short = "hb_least_error_scales", [factors_of(table, signed)], 16 - table.values.numel()
    if constants_of(quant_type) > 1:
        name, candidates = "hb_least_error_constants", [*zip(*RANGES, strict=True)]
    factors = [torch.tensor(numbers) for numbers in candidates]
    # A table of fewer values repeats the last one, behind boundaries that nothing passes.
    levels = torch.cat([table.levels, table.levels[-1:].expand(max(short, 0))])
    bounds = torch.nn.functional.pad(table.boundaries, (0, max(short, 0)), value=torch.inf)
    weights = None if importance is None else importance.float().contiguous()
    columns = 1 if weights is None else weights.numel()
    if short >= 0 and flat.dtype in DTYPES and run_native(
        name, flat.data_ptr(), DTYPES[flat.dtype], flat.numel(), blocksize,
        None if weights is None else weights.data_ptr(), columns, levels.data_ptr(),
        bounds.data_ptr(), *(numbers.data_ptr() for numbers in factors), len(factors[0]), scales.data_ptr(),
    ):  # fmt: skip
        return scales
    return least_error_scales_reference(weight, quant_type, blocksize, signed, importance)


@torch.library.impl("halfbyte::codes_for_scales", "CPU")
def _codes_for_scales(weight: Tensor, scales: Tensor, quant_type: str, blocksize: int) -> Tensor:
    library = _library(weight.dtype, blocksize)
    if library is None or bits_of(quant_type) != 4:
        return codes_for_scales_reference(weight, scales, quant_type, blocksize)
    return library.codes_for_scales(weight, scales, quant_type, blocksize)


@torch.library.impl("halfbyte::choose_codes", "CPU")
def _choose_codes(state: Tensor, scales: Tensor, factor: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    bounds, factor = (levels[:-1] + levels[1:]) / 2, factor.contiguous()
    ranks, errors = torch.empty(state.shape, dtype=torch.uint8), torch.empty_like(state)
    if _plain(state, scales, factor, levels) and run_native(
        "hb_choose_codes", state.data_ptr(), scales.data_ptr(), *state.shape, factor.data_ptr(), factor.stride(0),
        levels.data_ptr(), bounds.data_ptr(), len(levels), ranks.data_ptr(), errors.data_ptr(),
    ):  # fmt: skip
        return ranks, errors
    return choose_codes_reference(state, scales, factor, levels)


@torch.library.impl("halfbyte::improve_codes_", "CPU")
def _improve_codes(
    ranks: Tensor, values: Tensor, pull: Tensor, scales: Tensor, moments: Tensor, levels: Tensor
) -> None:
    bounds, (rows, columns) = (levels[:-1] + levels[1:]) / 2, pull.shape
    changes = torch.empty(rows, columns, dtype=torch.int64)  # most of it is never touched
    ends = torch.empty(rows, 1 + -(-columns // MOST), dtype=torch.int32)
    if not _plain(values, pull, scales, moments, levels) or not ranks.is_contiguous() or not run_native(
        "hb_improve_codes", ranks.data_ptr(), values.data_ptr(), pull.data_ptr(), scales.data_ptr(), rows, columns,
        moments.data_ptr(), levels.data_ptr(), bounds.data_ptr(), len(levels), changes.data_ptr(), ends.data_ptr(),
    ):  # fmt: skip
        improve_codes_reference(ranks, values, pull, scales, moments, levels)


def _plain(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)


@torch.library.impl("halfbyte::product", "CPU")
def _product(a: Tensor, b: Tensor) -> Tensor:
    out = empty((len(a), len(b)), a.dtype)
    linear_into(out, a.contiguous(), b.contiguous(), None, None)
    return out


@torch.library.impl("halfbyte::add_product_", "CPU")
def _add_product(sums: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    native = a.dtype == b.dtype and a.dtype in DTYPES and sums.dtype == torch.float32 and sums.stride(1) == 1
    if not (native and 0 not in (*a.shape, *b.shape)) or not run_native(
        "hb_add_product", a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), DTYPES[a.dtype], *a.shape, b.shape[1],
        alpha, sums.data_ptr(), sums.stride(0),
    ):  # fmt: skip
        sums.addmm_(a.to(sums.dtype), b.to(sums.dtype), alpha=alpha)


@torch.library.impl("halfbyte::dequantize_4bit", "CPU")
def _dequantize_4bit(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str, blocksize: int,
    shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    library = _library(dtype, blocksize)
    weight = (codes, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    if library is None:
        return dequantize_reference(*weight, tuple(shape), dtype)
    out = torch.empty(shape, dtype=dtype)
    WeightView(*weight, (1, prod(shape))).dequantize_into(library, out)
    return out


@torch.library.impl("halfbyte::linear_4bit", "CPU")
def _linear_4bit(
    x: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str,
    blocksize: int, out_features: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    in_features = x.shape[-1]
    weight = (codes, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    rows = x.reshape(-1, in_features) if in_features else x.new_empty(prod(x.shape[:-1]), 0)
    rows = rows.contiguous()
    result = empty((*x.shape[:-1], out_features), x.dtype)  # not a view itself: PEFT's methods add to it in place
    out = result.view(rows.shape[0], out_features)
    if out.numel() and (whole := int8_rows(*weight, in_features)) is not None:
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        linear_into(out, rows, whole[0], bias, whole[1])
    elif out.numel():
        library = fused_library(rows, quant_type, blocksize, in_features)
        view = GroupView([Member(weight, out_features, bias)], in_features, x.dtype)
        if library is None or view.linear(library, rows, out, None) == NO_MEMORY:
            bias = None if bias is None else bias.to(x.dtype)
            panel.linear(rows, weight, bias, out, _library(x.dtype, blocksize))
    return result


@torch.library.impl("halfbyte::linear_4bit_dx", "CPU")
def _linear_4bit_dx(
    grad: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: float, quant_type: str,
    blocksize: int, in_features: int,
) -> Tensor:  # fmt: skip
    out_features = grad.shape[-1]
    weight = (codes, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    rows = grad.reshape(-1, out_features) if out_features else grad.new_empty(prod(grad.shape[:-1]), 0)
    rows = rows.contiguous()
    out = empty((rows.shape[0], in_features), grad.dtype)
    if out.numel() and (whole := int8_rows(*weight, in_features)) is not None:
        dx_into(out, rows, *whole)
    elif out.numel():
        library = fused_library(rows, quant_type, blocksize, in_features)
        view = GroupView([Member(weight, out_features)], in_features, grad.dtype)
        if library is None or view.linear_backward(library, rows, None, None, out) == NO_MEMORY:
            panel.linear_dx(rows, weight, out, _library(grad.dtype, blocksize))
    return out.view(*grad.shape[:-1], in_features)
