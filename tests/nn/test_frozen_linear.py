"""FrozenLinear: F.linear with a 16-bit weight in a wider dtype, without a wide copy of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import halfbyte.nn.frozen_linear as module
from halfbyte.nn import FrozenLinear


class Widest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.nbytes)
        return result


def frozen(out: int, in_: int, dtype: torch.dtype, bias: bool = False) -> FrozenLinear:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(out, in_, generator=generator).to(dtype), requires_grad=False)
    return FrozenLinear(weight, torch.randn(out, generator=generator) if bias else None)


@pytest.mark.parametrize("panel_rows", [1, 7, 50, 1000])
@pytest.mark.parametrize("shape", [(1, 24), (2, 9, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_linear(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...], panel_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PANEL_BYTES", panel_rows * 24 * 4)
    layer = frozen(50, 24, dtype, bias)
    x = torch.randn(shape, requires_grad=True)
    y, expected = layer(x), F.linear(x, layer.weight.float(), layer.bias)
    grad = torch.randn_like(expected)
    # Sums in another order: at most 50 terms, each about 1; 1e-5 is 80 eps.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], rtol=1e-5, atol=1e-5
    )


def test_same_dtype_is_plain_linear() -> None:
    layer = frozen(50, 24, torch.float32, bias=True)
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_narrower_input() -> None:
    layer = frozen(50, 24, torch.float32)
    assert layer(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16


def test_no_wide_copy_is_held() -> None:
    """Forward and backward make nothing larger than a panel; what waits for backward is the 16-bit weight itself."""
    layer = frozen(8192, 1024, torch.bfloat16)  # 33.5 MB in fp32: four panels of 8 MiB
    x = torch.randn(4, 1024, requires_grad=True)
    saved: list[Tensor] = []
    with Widest() as widest, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert module.PANEL_BYTES // 2 < widest.bytes <= module.PANEL_BYTES
    assert {tensor.dtype for tensor in saved} == {torch.bfloat16}
    assert {tensor.data_ptr() for tensor in saved} == {layer.weight.data_ptr()}


def test_shares_the_weight_it_is_given() -> None:
    weight = nn.Parameter(torch.randn(5, 4).bfloat16(), requires_grad=False)
    assert FrozenLinear(weight).weight is weight
