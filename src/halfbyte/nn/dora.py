"""DoRA (arXiv 2402.09353) on a 4-bit weight: each row of ``W + s B A`` stretched to a trained length."""

from __future__ import annotations

import torch
from torch import Tensor

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.nn.layer_spec import Projection


@torch.no_grad()
def row_norms(layer: Projection) -> Tensor:
    """||W + s B A|| of each row, (out,) float32, for which W is not decoded but multiplied by A, r rows.

    ``||W||^2 + 2 s <W, B A> + s^2 ||B A||^2``, of which the first does not change.
    """
    base, lora_A, lora_B, scaling = layer.base, layer.lora_A, layer.lora_B, layer.scaling
    if lora_A is None or lora_B is None:
        return base.row_squares.sqrt()
    product = torch.ops.halfbyte.linear_4bit(lora_A, *base.quantized_weight.op_args, base.out_features, None)
    mixed = 2 * scaling * product.T + scaling**2 * (lora_B @ (lora_A @ lora_A.T))
    squares: Tensor = base.row_squares + (lora_B * mixed).sum(1)
    return squares.clamp_(min=0).sqrt_()


def row_factors(layer: Projection) -> Tensor:
    """What rows are multiplied by, (out,) float32; the norms count as constants, as in the paper, so that its gradient
    is the magnitude's."""
    assert layer.magnitude is not None
    return layer.magnitude / row_norms(layer)
