"""A PEFT-wrapped 4-bit layer as one operator forward and one backward, with no extra pass over y or dx."""

from __future__ import annotations

from typing import Any, Self

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.nn.dora import row_norms, stretched
from halfbyte.nn.layer_spec import Projection, projection

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _LoraLinear(torch.autograd.Function):
    """x (T, in), A, B -> y (T, out). Saves x and ``u = x A^T``, never y and never a decoded weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, layer: Projection) -> Tensor:
        weight, bias = layer.base.quantized_weight, layer.base.bias if layer.magnitude is None else None
        y: Tensor
        y, u = torch.ops.halfbyte.lora_linear_4bit(
            x, *_group(weight.op_args, len(lora_B), bias, lora_A, lora_B, layer)
        )
        ctx.save_for_backward(x, u, lora_A, lora_B, *weight.op_args[:3])
        ctx.layer, ctx.numbers = layer, weight.op_args[3:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, u, lora_A, lora_B, *weight = ctx.saved_tensors
        group = _group((*weight, *ctx.numbers), len(lora_B), None, lora_A, lora_B, ctx.layer)
        need_dx = ctx.needs_input_grad[0]
        dx, (dA,), (dB,) = torch.ops.halfbyte.lora_linear_4bit_backward(grad, x, u, *group, need_dx)
        return dx if need_dx else None, dA, dB, None


def _group(
    weight: tuple[Any, ...], out_features: int, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, layer: Projection
) -> tuple[Any, ...]:
    """A group of one, as the operators take it."""
    codes, absmax, nested_absmax, nested_offset, quant_type, blocksize = weight
    return (
        [codes], [absmax], [nested_absmax], [nested_offset], quant_type, blocksize, [out_features], [bias], [lora_A],
        [lora_B], [layer.scaling],
    )  # fmt: skip


def lora_linear(x: Tensor, layer: Projection) -> Tensor:
    """``x W^T + bias + scaling (x A^T) B^T``, differentiable in x, A and B; with DoRA its rows but the bias stretched.

    Args:
        x: (..., in_features) float32, bfloat16 or float16; computed in the base's `compute_dtype`, if it has one.
        layer: has an adapter, float32; its base's bias is frozen.

    Returns:
        (..., out_features) in the dtype of x.
    """
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(layer.base.compute_dtype or x.dtype)
    y: Tensor = _LoraLinear.apply(rows, layer.lora_A, layer.lora_B, layer)  # type: ignore[no-untyped-call]
    if layer.magnitude is not None:
        y = stretched(y, layer.magnitude, row_norms(layer))
        y = y if layer.base.bias is None else y + layer.base.bias.to(y.dtype)
    return y.view(*x.shape[:-1], layer.base.out_features).to(x.dtype)


class LoraLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's `lora.Linear` around a Linear4bit, computed by `lora_linear` whenever that says the same.

    It is the wrapper it was made from, under the same parameter names: adapters are added, switched, saved and
    refused to merge as PEFT does it. Everything but one plain adapter (dropout in training, none or several active
    adapters, merged ones, variants but DoRA, a LoRA bias, mixed batches, autocast, hooks on the layers inside,
    adapters that are not float32) goes to PEFT's own forward.
    """

    @classmethod
    def around(cls, wrapper: PeftLinear) -> Self:
        """`wrapper` as this class, sharing its parameters, children and settings."""
        layer = cls.__new__(cls)
        layer.__dict__.update(wrapper.__dict__)
        return layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `x`."""
        layer = None if args or kwargs else self._plain(x)
        if layer is None:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        return lora_linear(x, layer)

    def _plain(self, x: Tensor) -> Projection | None:
        """The layer as `lora_linear` takes it, or None where only PEFT's forward says what is meant."""
        if x.dtype not in COMPUTE_DTYPES or torch.is_autocast_enabled(x.device.type):
            return None
        layer = projection(self, training=self.training)
        if layer is None or layer.lora_A is None or layer.lora_B is None:
            return None
        return None if any(_has_hooks(module) for module in self._inner()) else layer

    def _inner(self) -> list[nn.Module]:
        name = self.active_adapters[0]
        return [self.base_layer, self.lora_A[name], self.lora_B[name]]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def fuse_lora_layers(model: nn.Module) -> int:
    """Make `model` compute each of PEFT's `lora.Linear` around a Linear4bit as one fused operator.

    Adapters, their names and their parameters stay as they are: optimizers that hold them, saved adapters and PEFT's
    own functions go on working. Call it after `get_peft_model`; layers added later keep PEFT's forward until the next
    call.

    Returns:
        How many layers were exchanged.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is PeftLinear and projection(module.base_layer, training=False) is not None
    ]
    for name, module in found:
        model.set_submodule(name, LoraLinear.around(module))
    return len(found)
