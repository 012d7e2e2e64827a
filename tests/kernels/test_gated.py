"""Gated activations against float64 and against torch's functions, on every instruction set.

Both are x s(z) with the logistic function s. Over the sweep below, float32 is off by at most 2.1e-7 of |h| for SiLU,
where z = x. GELU rounds z, so its error grows with |z|: at most 1.9e-7 (1 + |z|) of |h|; torch's own is of the size of
x instead. The gradient's terms s and x s (1 - s) z' cancel, so its size is taken as 1 + |x z'|. The bound leaves a
margin of 2.4, and 4e-36 where z < -87: s is 1.6e-38 there. A 16-bit result adds one rounding to its own type.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from transformers.activations import ACT2FN

EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BOUND = 5e-7
TINY = {torch.float32: 4e-36, torch.bfloat16: 4e-36, torch.float16: 2.0**-25}  # float16's subnormal numbers
NAMES = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Ours and transformers'."""

gated, gated_backward = torch.ops.halfbyte.gated, torch.ops.halfbyte.gated_backward


def exact_activation(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """act(x), its slope, |z| where z is rounded, z'; in float64."""
    x = x.double()
    root = (8 / torch.pi) ** 0.5
    z = x if activation == "silu" else root * (x + 0.044715 * x**3)
    dz = torch.ones_like(x) if activation == "silu" else root * (1 + 3 * 0.044715 * x**2)
    s = torch.sigmoid(z)
    # s(-z) is 1 - s(z) without the cancellation
    return x * s, s + x * s * torch.sigmoid(-z) * dz, z.abs() * (activation != "silu"), dz


def assert_gated(isa: str, gate: Tensor, up: Tensor, g: Tensor, activation: str) -> None:
    dtype, gate_up = gate.dtype, torch.cat((gate, up), -1)
    act, slope, z, dz = exact_activation(gate, activation)
    wide_up, wide_g = up.double(), g.double()
    h = gated(gate_up, activation)
    d_gate_up, again = gated_backward(g, gate_up, activation)
    assert isa == "baseline" or torch.equal(again, h)
    assert (h.dtype, h.shape) == (dtype, g.shape)
    assert (d_gate_up.dtype, d_gate_up.shape) == (dtype, gate_up.shape)
    d_gate, d_up = d_gate_up.chunk(2, -1)
    size = gate.double().abs() if isa == "baseline" and activation == "gelu_tanh" else act.abs() * (1 + z)
    for found, exact, scale in (
        (h, act * wide_up, size * wide_up.abs()),
        (again, act * wide_up, size * wide_up.abs()),
        (d_up, act * wide_g, size * wide_g.abs()),
        (d_gate, slope * wide_up * wide_g, (wide_up * wide_g).abs() * (1 + (gate.double() * dz).abs().clamp(max=30))),
    ):
        bound = BOUND * scale + EPS[dtype] * exact.abs() + TINY[dtype]
        excess = ((found.double() - exact).abs() - bound).max().item()
        assert excess <= 0, f"{excess=} {dtype=} {activation=} {found.shape=}"


@pytest.mark.parametrize("activation", list(NAMES))
@pytest.mark.parametrize("dtype", list(EPS))
def test_gated_equals_the_oracle(isa: str, dtype: torch.dtype, activation: str) -> None:
    torch.manual_seed(0)
    for rows, width in ((5, 1), (3, 7), (3, 33), (4, 576), (2, 11008)):
        gate, up, g = (torch.randn(rows, width).to(dtype) for _ in range(3))
        assert_gated(isa, 3 * gate, up, g, activation)


@pytest.mark.parametrize("activation", list(NAMES))
def test_every_size_of_gate(isa: str, activation: str) -> None:
    small = torch.logspace(-30, 1, 10_001)
    gate = torch.cat((torch.linspace(-110, 110, 200_001), small, -small))[None]
    ones = torch.ones_like(gate)
    assert_gated(isa, gate, ones, ones, activation)


@pytest.mark.parametrize("activation", list(NAMES))
def test_gated_is_that_of_transformers(isa: str, activation: str) -> None:
    gate_up, g = torch.randn(2, 5, 200, requires_grad=True), torch.randn(2, 5, 100)
    gate, up = gate_up.chunk(2, -1)
    wanted = ACT2FN[NAMES[activation]](gate) * up
    (wanted_gradient,) = torch.autograd.grad(wanted, gate_up, g)
    d_gate_up, h = gated_backward(g, gate_up.detach(), activation)
    torch.testing.assert_close(h, wanted.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_gate_up, wanted_gradient, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("activation", list(NAMES))
def test_threads_change_nothing(isa: str, activation: str) -> None:
    gate_up, g = torch.randn(200, 2000).bfloat16(), torch.randn(200, 1000).bfloat16()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((gated(gate_up, activation), *gated_backward(g, gate_up, activation)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_edges(isa: str) -> None:
    """Rows that are not contiguous, none, of no width; NaN stays where it is."""
    gate_up, g = torch.randn(34, 5).t(), torch.randn(17, 5).t()
    assert torch.equal(gated(gate_up, "silu"), gated(gate_up.contiguous(), "silu"))
    found, wanted = (gated_backward(x, y, "silu") for x, y in ((g, gate_up), (g.contiguous(), gate_up.contiguous())))
    assert all(map(torch.equal, found, wanted))
    for shape in ((0, 34), (3, 0)):
        assert gated(torch.empty(shape), "silu").shape == (shape[0], shape[1] // 2)
        assert gated_backward(torch.empty(shape[0], shape[1] // 2), torch.empty(shape), "silu")[0].shape == shape
    for activation in NAMES:
        for column in (2, 33, 35, 66):  # a gate and an up, in whole vectors and in the rest
            gate_up = torch.randn(2, 68)
            gate_up[1, column] = torch.nan
            h = gated(gate_up, activation)
            d_gate_up, again = gated_backward(torch.ones(2, 34), gate_up, activation)
            assert h.isnan().nonzero().tolist() == [[1, column % 34]]
            assert again.isnan().nonzero().tolist() == [[1, column % 34]]
            assert d_gate_up.isnan().nonzero().tolist()[0] == [1, column % 34]


def test_wrong_inputs_are_refused(isa: str) -> None:
    gate_up, g = torch.randn(3, 16), torch.randn(3, 8)
    for call in (
        lambda: gated(gate_up[:, :15], "silu"),
        lambda: gated(gate_up, "relu"),
        lambda: gated(gate_up.double(), "silu"),
        lambda: gated_backward(g[:2], gate_up, "silu"),
        lambda: gated_backward(g.half(), gate_up, "silu"),
        lambda: gated_backward(g, gate_up, "gelu"),
    ):
        with pytest.raises(ValueError, match=r"no .* of|not gates and ups|the gradient is"):
            call()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch 2.13 tracing; nothing of ours is in it
def test_opcheck() -> None:
    for activation in NAMES:
        opcheck(gated, (torch.randn(3, 34), activation))
        opcheck(gated_backward, (torch.randn(3, 17), torch.randn(3, 34), activation))
