"""Products with a frozen weight (output head, `skip_modules`) of any dtype, or in int8 with scales.

    linear_frozen(x, weight, bias, scales=None)   (..., in) -> (..., out): x W^T + bias, in the dtype of x
    linear_frozen_dx(grad, weight, scales=None)   (..., out) -> (..., in): grad W, in the dtype of grad

No path holds a whole weight in the dtype of x. The weight gets no gradient. For int8 see quant/int8.py.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.kernels.abi import DTYPES, WEIGHT_DTYPES
from halfbyte.kernels.buffers import empty
from halfbyte.kernels.registry import run_native
from halfbyte.quant.int8 import check_int8, dequantize_int8

PANEL_BYTES = 8 * 2**20
"""Largest piece of the weight that the plain default holds in the dtype of x."""

torch.library.define(
    "halfbyte::linear_frozen", "(Tensor x, Tensor weight, Tensor? bias, Tensor? scales=None) -> Tensor"
)
torch.library.define("halfbyte::linear_frozen_dx", "(Tensor grad, Tensor weight, Tensor? scales=None) -> Tensor")


def check_product(
    x: Tensor, weight: Tensor, features: int, bias: Tensor | None = None, scales: Tensor | None = None
) -> None:
    torch._check(weight.dim() == 2, lambda: f"weight must be (out, in), not {tuple(weight.shape)}")
    torch._check(x.is_floating_point(), lambda: f"cannot multiply {x.dtype}")
    if scales is None:
        torch._check(weight.is_floating_point(), lambda: f"weight must be floating, not {weight.dtype}")
    else:
        check_int8(weight, scales)
    torch._check(
        x.dim() > 0 and x.shape[-1] == features,
        lambda: f"{tuple(x.shape)} does not fit a weight of {tuple(weight.shape)}",
    )
    if bias is not None:
        torch._check(
            bias.shape == (weight.shape[0],), lambda: f"bias of {tuple(bias.shape)} for {weight.shape[0]} outputs"
        )


def _panels(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    rows = max(PANEL_BYTES // max(weight.shape[1] * dtype.itemsize, 1), 1)
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


def _panel(weight: Tensor, scales: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    return weight[rows].to(dtype) if scales is None else dequantize_int8(weight[rows], scales[rows], dtype)


def plain_linear_frozen(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None) -> Tensor:
    """The specification: any device, any floating dtypes; casts or decodes the weight panel by panel."""
    check_product(x, weight, weight.shape[-1], bias, scales)
    bias = None if bias is None else bias.to(x.dtype)
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    for rows in _panels(weight, x.dtype):
        y[..., rows] = x @ _panel(weight, scales, rows, x.dtype).T
    return y if bias is None else y.add_(bias)


torch.library.impl("halfbyte::linear_frozen", "CompositeExplicitAutograd", plain_linear_frozen)


@torch.library.register_fake("halfbyte::linear_frozen")
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None) -> Tensor:
    check_product(x, weight, weight.shape[-1], bias, scales)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def plain_linear_frozen_dx(grad: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """The specification of the other product."""
    check_product(grad, weight, weight.shape[0], scales=scales)
    if grad.dtype == weight.dtype:
        return grad @ weight
    dx = grad.new_zeros(*grad.shape[:-1], weight.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
    for rows in _panels(weight, grad.dtype):
        dx += grad[..., rows] @ _panel(weight, scales, rows, grad.dtype)
    return dx.to(grad.dtype)


torch.library.impl("halfbyte::linear_frozen_dx", "CompositeExplicitAutograd", plain_linear_frozen_dx)


@torch.library.register_fake("halfbyte::linear_frozen_dx")
def _dx_fake(grad: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    check_product(grad, weight, weight.shape[0], scales=scales)
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _native(x: Tensor, weight: Tensor, scales: Tensor | None) -> bool:
    """Does the native library know this case?"""
    if 0 in (*x.shape, *weight.shape) or not (weight.is_contiguous() and (scales is None or scales.is_contiguous())):
        return False
    return x.dtype in DTYPES and weight.dtype in WEIGHT_DTYPES


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> None:
    """x (n, in) W^T + bias into out (n, out). x, bias and out are contiguous and share a CPU dtype."""
    if not _native(x, weight, scales) or not run_native(
        "hb_linear_frozen", weight.data_ptr(), _pointer(scales), WEIGHT_DTYPES[weight.dtype], *weight.shape,
        x.data_ptr(), DTYPES[x.dtype], x.shape[0], _pointer(bias), out.data_ptr(),
    ):  # fmt: skip
        if x.dtype == weight.dtype and bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            out.copy_(plain_linear_frozen(x, weight, bias, scales))


def dx_into(out: Tensor, grad: Tensor, weight: Tensor, scales: Tensor | None) -> None:
    """grad (n, out) W into out (n, in). grad and out are contiguous and share a CPU dtype."""
    if not _native(grad, weight, scales) or not run_native(
        "hb_linear_frozen_dx", weight.data_ptr(), _pointer(scales), WEIGHT_DTYPES[weight.dtype], *weight.shape,
        grad.data_ptr(), DTYPES[grad.dtype], grad.shape[0], out.data_ptr(),
    ):  # fmt: skip
        if grad.dtype == weight.dtype:
            torch.mm(grad, weight, out=out)
        else:
            out.copy_(plain_linear_frozen_dx(grad, weight, scales))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _as_rows(x: Tensor, features: int) -> Tensor:
    return x.contiguous().view(prod(x.shape[:-1]), features)


@torch.library.impl("halfbyte::linear_frozen", "CPU")
def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None) -> Tensor:
    check_product(x, weight, weight.shape[-1], bias, scales)
    rows = _as_rows(x, weight.shape[1])
    y = empty((rows.shape[0], weight.shape[0]), x.dtype)
    linear_into(y, rows, weight, None if bias is None else bias.to(x.dtype).contiguous(), scales)
    return y.view(*x.shape[:-1], weight.shape[0])


@torch.library.impl("halfbyte::linear_frozen_dx", "CPU")
def _dx_cpu(grad: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    check_product(grad, weight, weight.shape[0], scales=scales)
    rows = _as_rows(grad, weight.shape[0])
    dx = empty((rows.shape[0], weight.shape[1]), grad.dtype)
    dx_into(dx, rows, weight, scales)
    return dx.view(*grad.shape[:-1], weight.shape[1])


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, scales = inputs
    ctx.save_for_backward(weight, scales)
    ctx.bias = None if bias is None else (bias.dtype, list(range(x.dim() - 1)))


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    weight, scales = ctx.saved_tensors
    grad_x = torch.ops.halfbyte.linear_frozen_dx(grad, weight, scales) if ctx.needs_input_grad[0] else None
    grad_bias = None
    if ctx.needs_input_grad[2]:
        dtype, dims = ctx.bias
        grad_bias = (grad.sum(dims) if dims else grad).to(dtype)
    return grad_x, None, grad_bias, None


torch.library.register_autograd("halfbyte::linear_frozen", _linear_backward, setup_context=_save_weight)
