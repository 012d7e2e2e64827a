"""FrozenLinear: F.linear with a 16-bit weight in a wider dtype, without a wide copy of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.nn import FrozenLinear


def frozen(out: int, in_: int, dtype: torch.dtype, bias: bool = False) -> FrozenLinear:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(out, in_, generator=generator).to(dtype), requires_grad=False)
    return FrozenLinear(weight, torch.randn(out, generator=generator) if bias else None)


@pytest.mark.parametrize("shape", [(1, 24), (2, 9, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_linear(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    layer = frozen(50, 24, dtype, bias)
    x = torch.randn(shape, requires_grad=True)
    y, expected = layer(x), F.linear(x, layer.weight.float(), layer.bias)
    grad = torch.randn_like(expected)
    # Sums in another order: at most 50 terms, each about 1; 1e-5 is 80 eps.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], rtol=1e-5, atol=1e-5
    )


def test_same_dtype() -> None:
    layer = frozen(50, 24, torch.float32, bias=True)
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_narrower_input() -> None:
    layer = frozen(50, 24, torch.float32)
    assert layer(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16


def test_only_the_weight_itself_waits_for_backward() -> None:
    layer = frozen(50, 24, torch.bfloat16, bias=True)
    x = torch.randn(4, 24, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {tensor.data_ptr() for tensor in saved} == {layer.weight.data_ptr()}


def test_shares_the_weight_it_is_given() -> None:
    weight = nn.Parameter(torch.randn(5, 4).bfloat16(), requires_grad=False)
    assert FrozenLinear(weight).weight is weight
