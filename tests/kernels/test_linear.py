"""The fused matrix products against a float64 oracle, on every instruction set.

Bounds: a float32 sum of k products is off by at most k roundings of sum |x w|; measured over these cases the worst is
3.5e-7 of sum |x w| (about 6 roundings, whatever k: sums run in blocks), so 1e-6 leaves a margin of 3. A 16-bit result
adds one rounding to its own type (half an eps; a whole one is allowed). Where bfloat16 is multiplied natively
(AVX512-BF16), the oracle takes weights rounded to it, but for the few rows that are multiplied in float32; torch's
product, where blocks cross rows, may round its parts' sums, too: up to half an eps of sum |x w| more.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.config.formats import constants_of
from halfbyte.kernels import panel
from halfbyte.kernels.registry import cpu_choice
from halfbyte.quant.absmax import compress_absmax

EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUM_BOUND = 1e-6
FEW_ROWS = 8
"""Up to which products are dot products in float32."""
# (out_features, in_features, blocksize): ragged outputs, tiles cut in every direction, blocks longer than a tile
SHAPES = [
    (64, 64, 64),
    (1, 32, 32),
    (37, 128, 64),
    (129, 1056, 32),
    (300, 1536, 512),
    (70, 576, 64),
    (130, 4096, 4096),
]
CROSSING = [(33, 40, 64), (7, 65, 32), (128, 96, 64)]  # blocks cross rows: panels serve

FUSED = pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"], indirect=True)
"""Instruction sets with products of our own; torch's, which panels use, promise less."""


def quantized(rows: int, cols: int, blocksize: int, quant_type: str = "nf4", nested: bool = True) -> tuple[Any, ...]:
    """Random, its scales of either sign, as `quant.scale` may choose them."""
    codes, absmax = torch.ops.halfbyte.quantize_4bit(torch.randn(rows, cols), quant_type, blocksize)
    absmax[::3].neg_()
    scales = compress_absmax(absmax, constants_of(quant_type)) if nested else (absmax, None, 0.0)
    return (codes, *scales, quant_type, blocksize)


def decoded(weight: tuple[Any, ...], rows: int, cols: int) -> Tensor:
    return torch.ops.halfbyte.dequantize_4bit(*weight, [rows, cols], torch.float32).double()


def assert_product(
    result: Tensor, left: Tensor, right: Tensor, bias: Tensor | float = 0.0, *, panels: bool = False
) -> None:
    """result = left @ right + bias, within rounding; `left` and `right` exact in float64. `panels`: torch served."""
    library = cpu_choice().library
    native = result.dtype == torch.bfloat16 and library is not None and library.fast_bf16
    if native and (panels or left.shape[0] > FEW_ROWS):
        right = right.bfloat16().double()
    exact = left.double() @ right + bias
    size = left.double().abs() @ right.abs() + abs(bias)
    rounded = exact.abs() + size if native and panels else exact.abs()
    bound = SUM_BOUND * size + EPS[result.dtype] * rounded
    excess = ((result.double() - exact).abs() - bound).max().item()
    assert excess <= 0, f"{excess=} {result.shape=} {result.dtype=}"


@pytest.mark.parametrize("quant_type", ["nf4", "int4-asym"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES + CROSSING)
def test_products_equal_the_oracle(isa: str, shape: tuple[int, int, int], nested: bool, quant_type: str) -> None:
    rows, cols, blocksize = shape
    torch.manual_seed(rows)
    weight = quantized(rows, cols, blocksize, quant_type, nested=nested)
    exact, panels = decoded(weight, rows, cols), shape in CROSSING
    for m in (1, 2, 5, 6, 7, 8, 9, 16, 37):
        for dtype in EPS:
            x, grad = torch.randn(m, cols).to(dtype), torch.randn(m, rows).to(dtype)
            bias = torch.randn(rows).to(dtype) if m % 2 else None
            y = torch.ops.halfbyte.linear_4bit(x, *weight, rows, bias)
            assert_product(y, x, exact.t(), 0.0 if bias is None else bias.double(), panels=panels)
            dx = torch.ops.halfbyte.linear_4bit_dx(grad, *weight, cols)
            assert_product(dx, grad, exact, panels=panels)


@pytest.mark.parametrize("quant_type", ["fp4", "int4", "int4-asym", "bof4-s", "int8", "nf3", "nf2"])
def test_codebooks_and_leading_dimensions(isa: str, quant_type: str) -> None:
    weight = quantized(96, 128, 64, quant_type)
    exact = decoded(weight, 96, 128)
    x = torch.randn(3, 128, 5).transpose(1, 2)  # (3, 5, 128), not contiguous
    y = torch.ops.halfbyte.linear_4bit(x, *weight, 96, None)
    assert y.shape == (3, 5, 96)
    assert_product(y.reshape(-1, 96), x.reshape(-1, 128), exact.t())
    dx = torch.ops.halfbyte.linear_4bit_dx(y, *weight, 128)
    assert_product(dx.reshape(-1, 128), y.reshape(-1, 96), exact)
    vector = torch.ops.halfbyte.linear_4bit(x[0, 0], *weight, 96, None)
    assert vector.shape == (96,)


def test_many_rows_in_parts(isa: str) -> None:
    """More rows than are packed at once, in float32 and in a type that needs a float32 copy of the sums."""
    for rows, cols in ((32, 16384), (16384, 32)):
        weight = quantized(rows, cols, 64)
        exact = decoded(weight, rows, cols)
        for dtype in EPS:
            x, grad = torch.randn(300, cols).to(dtype), torch.randn(300, rows).to(dtype)
            assert_product(torch.ops.halfbyte.linear_4bit(x, *weight, rows, None), x, exact.t())
            assert_product(torch.ops.halfbyte.linear_4bit_dx(grad, *weight, cols), grad, exact)


@pytest.mark.parametrize("m", [0, 1, 4])
def test_empty(isa: str, m: int) -> None:
    weight = quantized(64, 64, 64)
    if m == 0:
        assert torch.ops.halfbyte.linear_4bit(torch.randn(0, 64), *weight, 64, None).shape == (0, 64)
        assert torch.ops.halfbyte.linear_4bit_dx(torch.randn(2, 0, 64), *weight, 64).shape == (2, 0, 64)
        return
    nothing = quantized(0, 64, 64)
    assert torch.ops.halfbyte.linear_4bit(torch.randn(m, 64), *nothing, 0, None).shape == (m, 0)
    assert torch.equal(torch.ops.halfbyte.linear_4bit_dx(torch.randn(m, 0), *nothing, 64), torch.zeros(m, 64))
    nothing = quantized(64, 0, 64)
    bias = torch.randn(64)
    y = torch.ops.halfbyte.linear_4bit(torch.randn(m, 0), *nothing, 64, bias)
    assert torch.equal(y, bias.expand(m, 64))


@FUSED
def test_threads_change_nothing(isa: str) -> None:
    weight = quantized(200, 4096, 64)
    before = torch.get_num_threads()
    try:
        for m, dtype in itertools.product((3, 100), EPS):
            x, grad = torch.randn(m, 4096).to(dtype), torch.randn(m, 200).to(dtype)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(
                    (
                        torch.ops.halfbyte.linear_4bit(x, *weight, 200, None),
                        torch.ops.halfbyte.linear_4bit_dx(grad, *weight, 4096),
                    )
                )
            for y, dx in results[1:]:
                assert torch.equal(y, results[0][0])
                assert torch.equal(dx, results[0][1])
    finally:
        torch.set_num_threads(before)


@FUSED
def test_rows_do_not_depend_on_each_other(isa: str) -> None:
    """Packed and unpacked batches agree bit for bit: a row's result is the same in any batch of tile-kernel size."""
    weight = quantized(200, 1024, 64)
    for dtype in EPS:
        x, grad = torch.randn(100, 1024).to(dtype), torch.randn(100, 200).to(dtype)
        y = torch.ops.halfbyte.linear_4bit(x, *weight, 200, None)
        dx = torch.ops.halfbyte.linear_4bit_dx(grad, *weight, 1024)
        for start, stop in ((0, 16), (33, 50), (91, 100)):
            assert torch.equal(torch.ops.halfbyte.linear_4bit(x[start:stop], *weight, 200, None), y[start:stop])
            assert torch.equal(torch.ops.halfbyte.linear_4bit_dx(grad[start:stop], *weight, 1024), dx[start:stop])


def test_gradient_reaches_x_and_bias(isa: str) -> None:
    weight = quantized(48, 64, 64)
    exact = decoded(weight, 48, 64)
    x, bias = torch.randn(2, 9, 64, requires_grad=True), torch.randn(48, requires_grad=True)
    grad = torch.randn(2, 9, 48)
    torch.ops.halfbyte.linear_4bit(x, *weight, 48, bias).backward(grad)
    assert x.grad is not None
    assert bias.grad is not None
    assert_product(x.grad.reshape(-1, 64), grad.reshape(-1, 48), exact)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


@pytest.mark.parametrize("dtype", list(EPS))
def test_panels_equal_the_oracle(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback, in panels of a few rows."""
    monkeypatch.setattr(panel, "PANEL_ELEMENTS", 4096)
    library = cpu_choice().library
    for rows, cols, blocksize in SHAPES[2:5] + CROSSING:
        weight = quantized(rows, cols, blocksize)
        exact = decoded(weight, rows, cols)
        x, grad, bias = (torch.randn(shape).to(dtype) for shape in ((40, cols), (40, rows), (rows,)))
        y, dx = torch.empty(40, rows, dtype=dtype), torch.empty(40, cols, dtype=dtype)
        for serving in (library, None):
            panel.linear(x, weight, bias, y, serving)
            assert_product(y, x, exact.t(), bias.double(), panels=True)
            panel.linear_dx(grad, weight, dx, serving)
            assert_product(dx, grad, exact, panels=True)
