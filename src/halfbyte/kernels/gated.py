"""The gated activation of an MLP, act(gate) * up, and its gradient. Float32 arithmetic, one rounding.

`gate_up` holds a row's gates, then its ups: what one product with both weights side by side gives. The backward pass
also makes h = act(gate) * up again, so that nothing but `gate_up` need be kept for it.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.kernels.abi import DTYPES
from halfbyte.kernels.buffers import empty, empty_like
from halfbyte.kernels.registry import run_native

torch.library.define("halfbyte::gated", "(Tensor gate_up, str activation) -> Tensor")
torch.library.define("halfbyte::gated_backward", "(Tensor g, Tensor gate_up, str activation) -> (Tensor, Tensor)")

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
"""Activations in the library's numbering: x * sigmoid(x), and GELU by its tanh formula (gelu_pytorch_tanh)."""


def _check(gate_up: Tensor, activation: str, g: Tensor | None = None) -> None:
    """gate_up (..., 2 I), g (..., I) of its dtype. Raises ValueError."""
    if gate_up.dtype not in DTYPES or activation not in ACTIVATIONS:
        raise ValueError(f"no {activation} of {gate_up.dtype}; activations are {', '.join(ACTIVATIONS)}")
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"rows of {gate_up.shape} are not gates and ups")
    if g is not None and (g.dtype != gate_up.dtype or g.shape != (*gate_up.shape[:-1], gate_up.shape[-1] // 2)):
        raise ValueError(f"the gradient is {g.dtype} {g.shape}, gate_up {gate_up.dtype} {gate_up.shape}")


def _activate(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def plain_gated(gate_up: Tensor, activation: str) -> Tensor:
    _check(gate_up, activation)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (_activate(gate, activation) * up).to(gate_up.dtype)


torch.library.impl("halfbyte::gated", "CompositeExplicitAutograd", plain_gated)


@torch.library.register_fake("halfbyte::gated")
def _gated_fake(gate_up: Tensor, activation: str) -> Tensor:
    _check(gate_up, activation)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def plain_gated_backward(g: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _check(gate_up, activation, g)
    gate, up = gate_up.float().chunk(2, dim=-1)
    activated, wide = _activate(gate, activation), g.float()
    if activation == "silu":
        d_gate = torch.ops.aten.silu_backward(wide * up, gate)
    else:
        d_gate = torch.ops.aten.gelu_backward(wide * up, gate, approximate="tanh")
    return torch.cat((d_gate, wide * activated), dim=-1).to(gate_up.dtype), (activated * up).to(gate_up.dtype)


torch.library.impl("halfbyte::gated_backward", "CompositeExplicitAutograd", plain_gated_backward)


@torch.library.register_fake("halfbyte::gated_backward")
def _gated_backward_fake(g: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _check(gate_up, activation, g)
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(g.shape)


@torch.library.impl("halfbyte::gated", "CPU")
def _gated(gate_up: Tensor, activation: str) -> Tensor:
    _check(gate_up, activation)
    gate_up = gate_up.contiguous()
    *rows, width = gate_up.shape
    out = empty((*rows, width // 2), gate_up.dtype)
    done = run_native(
        "hb_gated", gate_up.data_ptr(), DTYPES[gate_up.dtype], prod(rows), width // 2, ACTIVATIONS[activation],
        out.data_ptr(),
    )  # fmt: skip
    return out if done else plain_gated(gate_up, activation)


@torch.library.impl("halfbyte::gated_backward", "CPU")
def _gated_backward(g: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _check(gate_up, activation, g)
    g, gate_up = g.contiguous(), gate_up.contiguous()
    *rows, width = g.shape
    d_gate_up, h = empty_like(gate_up), empty_like(g)
    done = run_native(
        "hb_gated_backward", g.data_ptr(), gate_up.data_ptr(), DTYPES[g.dtype], prod(rows), width,
        ACTIVATIONS[activation], d_gate_up.data_ptr(), h.data_ptr(),
    )  # fmt: skip
    return (d_gate_up, h) if done else plain_gated_backward(g, gate_up, activation)
