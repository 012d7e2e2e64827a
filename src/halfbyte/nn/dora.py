"""DoRA (arXiv 2402.09353) on a 4-bit weight: each row of ``W + s B A`` stretched to a trained length."""

from __future__ import annotations

import torch
from torch import Tensor

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.nn.layer_spec import Projection

TINY = 1e-30
"""Of a squared length."""


@torch.no_grad()
def row_norms(layer: Projection) -> Tensor:
    """||W + s B A|| of each row, (out,) float32, for which W is not decoded but multiplied by A, r rows.

    ``||W||^2 + 2 s <W, B A> + s^2 ||B A||^2``, of which the first does not change. Never 0: zero rows stay so.
    """
    base, lora_A, lora_B, scaling = layer.base, layer.lora_A, layer.lora_B, layer.scaling
    assert lora_A is not None
    assert lora_B is not None
    product = torch.ops.halfbyte.linear_4bit(lora_A, *base.quantized_weight.op_args, base.out_features, None)
    mixed = 2 * scaling * product.T + scaling**2 * (lora_B @ (lora_A @ lora_A.T))
    squares: Tensor = base.row_squares + (lora_B * mixed).sum(1)
    return squares.clamp_(min=TINY).sqrt_()


def stretched(y: Tensor, magnitude: Tensor, norms: Tensor, *, out: Tensor | None = None) -> Tensor:
    """y (T, out) times magnitude / norms, differentiable in y and magnitude; the norms are constants, as in the paper.

    What is rounded to the dtype of y is how far the factor is from 1: it hardly is.
    """
    result: Tensor = torch.addcmul(y, y, (magnitude / norms - 1).to(y.dtype), out=out)
    return result
