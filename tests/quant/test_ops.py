"""The operators as torch sees them: schema, fake, autograd, and a compiled layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from halfbyte.nn import Linear4bit
from halfbyte.quant import QuantizedWeight, quantize

pytestmark = pytest.mark.filterwarnings(
    # torch 2.13 tracing a graph with aot_autograd; nothing of ours is in it
    "ignore::DeprecationWarning:torch.*",
)


@pytest.fixture(params=[True, False], ids=["double", "single"])
def weight(request: pytest.FixtureRequest) -> QuantizedWeight:
    return quantize(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), double_quant=request.param)


def test_quantize() -> None:
    for shape in ((32, 48), (3, 5)):
        opcheck(torch.ops.halfbyte.quantize_4bit, (torch.randn(shape), "nf4", 64))


def test_quantize_8bit() -> None:
    for count in (0, 256, 300):
        opcheck(torch.ops.halfbyte.quantize_8bit, (torch.randn(count),))


def test_dequantize(weight: QuantizedWeight) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        opcheck(torch.ops.halfbyte.dequantize_4bit, (*weight.op_args, [32, 64], dtype))


@pytest.mark.parametrize("bias", [None, torch.randn(32), torch.randn(32, requires_grad=True)])
def test_linear(weight: QuantizedWeight, bias: Tensor | None) -> None:
    for shape in ((3, 64), (2, 3, 64)):
        x = torch.randn(shape, requires_grad=True)
        opcheck(torch.ops.halfbyte.linear_4bit, (x, *weight.op_args, 32, bias))


def test_linear_dx(weight: QuantizedWeight) -> None:
    opcheck(torch.ops.halfbyte.linear_4bit_dx, (torch.randn(3, 32), *weight.op_args, 64))


def test_fakes_check_sizes(weight: QuantizedWeight) -> None:
    """A wrong size shows while a graph is traced, not when it runs."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="code bytes"):
        torch.ops.halfbyte.dequantize_4bit(*weight.op_args, [32, 65], torch.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_compiled_layer(weight: QuantizedWeight, bias: bool) -> None:
    """fullgraph: no break at our layer; forward and backward give what eager mode gives."""
    torch._dynamo.reset()
    layers = nn.Sequential(
        Linear4bit.from_quantized(weight, torch.randn(32) if bias else None), nn.SiLU(),
        Linear4bit.from_weight(torch.randn(16, 32)),
    )  # fmt: skip
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, requires_grad=True)
    expected, found = layers(x), compiled(x)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (expected, found)]
    torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_compiled_layer_with_inductor(weight: QuantizedWeight) -> None:
    torch._dynamo.reset()
    layer = Linear4bit.from_quantized(weight)
    x = torch.randn(5, 64)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
