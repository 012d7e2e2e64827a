"""Products with a frozen, unquantized weight against a float64 oracle, on every instruction set.

Bounds as in test_linear.py: k products summed in float32 are within 1e-6 of sum |x w|, and a 16-bit result adds one
rounding to its own type. Where torch serves, a panel's sum may be rounded too; int8 is rounded to bfloat16 where that
is multiplied in pairs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte.kernels import frozen_linear
from halfbyte.quant.int8 import dequantize_int8, quantize_int8

EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUM_BOUND = 1e-6
# (out_features, in_features): ragged in every direction, whole tiles, deeper than a tile
SHAPES = [(1, 1), (33, 7), (64, 64), (50, 24), (129, 1030), (300, 577), (1031, 130)]


def assert_product(
    result: Tensor, left: Tensor, right: Tensor, bias: Tensor | float = 0.0, *, once: bool = False
) -> None:
    """result = left @ right + bias, within rounding; `once`: of the result alone."""
    exact = left.double() @ right.double() + bias
    size = left.double().abs() @ right.double().abs() + abs(bias)
    rounding = EPS[result.dtype] * (exact.abs() if once else 2 * size)
    excess = ((result.double() - exact).abs() - SUM_BOUND * size - rounding).max().item()
    assert excess <= 0, f"{excess=} {result.shape=} {result.dtype=}"


def operands(shape: tuple[int, int], m: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, cols = shape
    shapes = ((m, cols), (m, rows), (rows,))
    x, grad, bias = (torch.randn(size).to(dtype) for size in shapes)
    return x, grad, bias, torch.randn(shape).to(weight_dtype)


@pytest.mark.parametrize("weight_dtype", list(EPS))
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_oracle(isa: str, shape: tuple[int, int], weight_dtype: torch.dtype) -> None:
    torch.manual_seed(shape[0])
    for m in (1, 2, 3, 5, 6, 8, 9, 16, 37):
        for dtype in EPS:
            x, grad, bias, weight = operands(shape, m, dtype, weight_dtype)
            given = bias if m % 2 else None
            y = torch.ops.halfbyte.linear_frozen(x, weight, given)
            assert y.dtype == dtype
            tiles = isa != "baseline"
            assert_product(y, x, weight.t(), 0.0 if given is None else given.double(), once=tiles)
            assert_product(torch.ops.halfbyte.linear_frozen_dx(grad, weight), grad, weight, once=tiles)


def int8(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and what they stand for."""
    codes, scales = quantize_int8(torch.randn(shape) * torch.rand(shape[0], 1))
    return codes, scales, codes.double() * scales.double().repeat_interleave(64, 1)[:, : shape[1]]


@pytest.mark.parametrize("shape", [*SHAPES, (37, 7001), (4100, 20)])
def test_int8_products_equal_the_oracle(isa: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(shape[0])
    codes, scales, exact = int8(shape)
    for m in (1, 2, 3, 5, 6, 8, 9, 16, 37):
        for dtype in EPS:
            x, grad, bias, _ = operands(shape, m, dtype, torch.float32)
            given = bias if m % 2 else None
            y = torch.ops.halfbyte.linear_frozen(x, codes, given, scales)
            assert y.dtype == dtype
            assert_product(y, x, exact.t(), 0.0 if given is None else given.double())
            assert_product(torch.ops.halfbyte.linear_frozen_dx(grad, codes, scales), grad, exact)


def test_slabs_and_parts(isa: str) -> None:
    """More outputs and more rows than dx packs at once; longer rows than a few rows' dot products take at once."""
    for dtype in EPS:
        _, grad, _, weight = operands((4100, 20), 1030, dtype, torch.bfloat16)
        assert_product(torch.ops.halfbyte.linear_frozen_dx(grad, weight), grad, weight)
        for m in (1, 4, 8):
            x, _, bias, weight = operands((37, 7001), m, dtype, torch.float16)
            assert_product(torch.ops.halfbyte.linear_frozen(x, weight, bias), x, weight.t(), bias.double())


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"], indirect=True)
def test_threads_change_nothing(isa: str) -> None:
    x, grad, _, plain = operands((2500, 300), 50, torch.float32, torch.bfloat16)
    codes, scales, _ = int8((2500, 300))
    before, results = torch.get_num_threads(), list[list[Tensor]]()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([])
            for weight, scale in ((plain, None), (codes, scales)):
                results[-1] += [torch.ops.halfbyte.linear_frozen(rows, weight, None, scale) for rows in (x, x[:3])]
                results[-1].append(torch.ops.halfbyte.linear_frozen_dx(grad, weight, scale))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_leading_dimensions_and_strides(isa: str) -> None:
    weight = torch.randn(96, 50).bfloat16()
    x = torch.randn(3, 50, 5).transpose(1, 2)
    y = torch.ops.halfbyte.linear_frozen(x, weight, None)
    assert y.shape == (3, 5, 96)
    assert_product(y.reshape(-1, 96), x.reshape(-1, 50), weight.t())
    dx = torch.ops.halfbyte.linear_frozen_dx(y, weight)
    assert_product(dx.reshape(-1, 50), y.reshape(-1, 96), weight)
    across = weight.t()  # a weight that lies the other way round
    assert_product(torch.ops.halfbyte.linear_frozen(y, across, None).reshape(-1, 50), y.reshape(-1, 96), weight)
    assert torch.ops.halfbyte.linear_frozen(x[0, 0], weight, None).shape == (96,)


@pytest.mark.parametrize("m", [0, 1, 9])
def test_empty(isa: str, m: int) -> None:
    for rows, cols in ((0, 24), (24, 0), (24, 24)):
        weight, bias = torch.randn(rows, cols).bfloat16(), torch.randn(rows)
        y = torch.ops.halfbyte.linear_frozen(torch.randn(m, cols), weight, bias)
        dx = torch.ops.halfbyte.linear_frozen_dx(torch.randn(m, rows), weight)
        assert (y.shape, dx.shape) == ((m, rows), (m, cols))
        if not cols:
            assert torch.equal(y, bias.expand(m, rows))
        if not rows:
            assert not dx.any()


@pytest.mark.parametrize("panel_rows", [1, 7, 50, 1000])
def test_default_in_panels(panel_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_linear, "PANEL_BYTES", panel_rows * 24 * 4)
    for dtype in (torch.float32, torch.bfloat16):
        x, grad, bias, weight = operands((50, 24), 9, dtype, torch.float16)
        assert_product(frozen_linear.plain_linear_frozen(x, weight, bias), x, weight.t(), bias.double())
        assert_product(frozen_linear.plain_linear_frozen_dx(grad, weight), grad, weight)
        codes, scales, _ = int8((50, 24))
        weight = dequantize_int8(codes, scales, dtype)
        assert_product(frozen_linear.plain_linear_frozen(x, codes, bias, scales), x, weight.t(), bias.double())
        assert_product(frozen_linear.plain_linear_frozen_dx(grad, codes, scales), grad, weight)


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


def test_default_holds_no_wide_copy() -> None:
    weight = torch.randn(8192, 1024).bfloat16()  # 33.5 MB in fp32: four panels of 8 MiB
    with Widest() as widest:
        y = frozen_linear.plain_linear_frozen(torch.randn(4, 1024), weight, None)
        frozen_linear.plain_linear_frozen_dx(y, weight)
    assert frozen_linear.PANEL_BYTES // 2 < widest.bytes <= frozen_linear.PANEL_BYTES


def test_gradient_reaches_x_and_bias(isa: str) -> None:
    x, grad, bias, weight = operands((48, 30), 18, torch.float32, torch.bfloat16)
    x, bias = x.view(2, 9, 30).requires_grad_(), bias.requires_grad_()
    torch.ops.halfbyte.linear_frozen(x, weight, bias).backward(grad.view(2, 9, 48))
    assert x.grad is not None
    assert bias.grad is not None
    assert_product(x.grad.reshape(-1, 30), grad, weight)
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_gradcheck() -> None:
    x, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    weight = torch.randn(7, 5, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda x, bias: torch.ops.halfbyte.linear_frozen(x, weight, bias),
        (x.requires_grad_(), bias.requires_grad_()),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch 2.13 tracing with aot_autograd
def test_schema(isa: str) -> None:
    for shape in ((3, 24), (2, 9, 24)):
        x, weight = torch.randn(shape, requires_grad=True), torch.randn(50, 24).bfloat16()
        for bias in (None, torch.randn(50), torch.randn(50, requires_grad=True)):
            opcheck(torch.ops.halfbyte.linear_frozen, (x, weight, bias))
    opcheck(torch.ops.halfbyte.linear_frozen_dx, (torch.randn(3, 50), weight))
    codes, scales, _ = int8((50, 24))
    opcheck(torch.ops.halfbyte.linear_frozen, (x, codes, None, scales))
    opcheck(torch.ops.halfbyte.linear_frozen_dx, (torch.randn(3, 50), codes, scales))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.ones(3, 23), torch.ones(50, 24), None, "does not fit"),
        (torch.ones(3, 24, dtype=torch.int64), torch.ones(50, 24), None, "cannot multiply"),
        (torch.ones(3, 24), torch.ones(50, 24, dtype=torch.uint8), None, "floating"),
        (torch.ones(3, 24), torch.ones(24), None, "out, in"),
        (torch.ones(3, 24), torch.ones(50, 24), torch.ones(49), "50 outputs"),
    ],
)
def test_refusals(isa: str, x: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.halfbyte.linear_frozen(x, weight, bias)
