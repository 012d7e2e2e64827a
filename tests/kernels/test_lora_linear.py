"""A group of 4-bit layers with adapters against a float64 oracle, on every instruction set.

Bounds as in test_linear: an fp32 sum is off by at most 1e-6 of the sum of its terms' magnitudes (a product of three
factors, by that of each sum in turn; measured at most 5e-7 in all), and a 16-bit result by one rounding of its own.
Where bfloat16 is multiplied natively, the oracle takes what goes into a product rounded to it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.config.formats import constants_of
from halfbyte.kernels import lora_linear
from halfbyte.kernels.registry import cpu_choice
from halfbyte.quant.absmax import compress_absmax

EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUM_BOUND = 1e-6

FUSED = pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"], indirect=True)


@dataclass
class Case:
    """A group's operator arguments, and its exact matrices by member."""

    args: tuple[Any, ...]
    weights: list[Tensor]

    @property
    def biases(self) -> list[Tensor | None]:
        return self.args[7]

    @property
    def adapters(self) -> list[tuple[Tensor, Tensor, float] | None]:
        pairs = zip(self.args[8], self.args[9], self.args[10], strict=True)
        return [None if a is None else (a, b, s) for a, b, s in pairs]


def group(
    cols: int,
    members: list[tuple[int, int]],
    blocksize: int = 64,
    quant_type: str = "nf4",
    nested: bool = True,
    bias_dtype: torch.dtype | None = None,
) -> Case:
    """`members`: (out_features, rank) each; rank 0 for none. Every second member has a bias if a dtype is given."""
    lists: list[list[Any]] = [[] for _ in range(9)]
    weights = []
    for number, (rows, rank) in enumerate(members):
        codes, absmax = torch.ops.halfbyte.quantize_4bit(torch.randn(rows, cols), quant_type, blocksize)
        scales = compress_absmax(absmax, constants_of(quant_type)) if nested else (absmax, None, 0.0)
        bias = torch.randn(rows).to(bias_dtype) if bias_dtype and number % 2 == 0 else None
        a, b = (torch.randn(rank, cols), torch.randn(rows, rank)) if rank else (None, None)
        for each, value in zip(lists, (codes, *scales, rows, bias, a, b, 0.5 + number), strict=False):
            each.append(value)
        shape = [rows, cols]
        weights.append(
            torch.ops.halfbyte.dequantize_4bit(codes, *scales, quant_type, blocksize, shape, torch.float32).double()
        )
    return Case((*lists[:4], quant_type, blocksize, *lists[4:8], lists[8] or []), weights)


@dataclass(frozen=True)
class Served:
    """How a case's products run: what goes into them rounded to bfloat16, and how often a result is rounded."""

    pairs: bool
    tiles: bool
    once: bool

    def adapter(self, tensor: Tensor) -> Tensor:
        """What enters a product of the adapters' own."""
        return tensor.bfloat16().double() if self.pairs else tensor.double()

    def joint(self, tensor: Tensor) -> Tensor:
        """What enters a product that ends in y or dx: a few rows are multiplied in float32."""
        return tensor.bfloat16().double() if self.pairs and self.tiles else tensor.double()


def served(case: Case, x: Tensor) -> Served:
    library = cpu_choice().library
    fused = library is not None and library.fused_linear and x.shape[1] % case.args[5] == 0
    pairs = fused and x.dtype == torch.bfloat16 and library.fast_bf16
    return Served(pairs, x.shape[0] > 8, fused)


def close(result: Tensor, exact: Tensor, size: Tensor, dtype: torch.dtype, once: bool = True) -> None:
    """`size`: the sum of the terms' magnitudes. fp32 sums are rounded once to a 16-bit dtype.

    The default adds the adapter to a rounded product, and torch's bfloat16 rounds its operands: up to three roundings
    of `size` in all.
    """
    assert result.shape == exact.shape
    rounding = EPS[result.dtype] * exact.abs() if once else 3 * EPS[dtype] * size
    excess = ((result.double() - exact).abs() - SUM_BOUND * size - rounding).max().item() if exact.numel() else 0.0
    assert excess <= 0, f"{excess=} {tuple(result.shape)} {result.dtype}"


def check_forward(case: Case, x: Tensor) -> Tensor:
    y, u = torch.ops.halfbyte.lora_linear_4bit(x, *case.args)
    assert (y.dtype, u.dtype) == (x.dtype, torch.float32)
    how, exact_x, low = served(case, x), x.double(), 0
    ys, sizes, us, u_sizes = [], [], [exact_x[:, :0]], [exact_x[:, :0]]
    for w, bias, adapter in zip(case.weights, case.biases, case.adapters, strict=True):
        w = how.joint(w)
        y_i, size = exact_x @ w.t(), exact_x.abs() @ w.abs().t()
        if bias is not None:
            y_i, size = y_i + bias.double(), size + bias.double().abs()
        if adapter is not None:
            a, b = how.adapter(adapter[0]), how.joint(adapter[1] * adapter[2])
            us.append(exact_x @ a.t())
            u_sizes.append(exact_x.abs() @ a.abs().t())
            u_i = how.joint(u[:, low : low + len(a)])  # the kernel's own: what it rounds to could differ by one else
            y_i, size = y_i + u_i @ b.t(), size + u_sizes[-1] @ b.abs().t()
            low += len(a)
        ys.append(y_i)
        sizes.append(size)
    close(y, torch.cat(ys, 1), torch.cat(sizes, 1), x.dtype, how.once)
    close(u, torch.cat(us, 1), torch.cat(u_sizes, 1), x.dtype, how.once)
    return u


def check_backward(case: Case, g: Tensor, x: Tensor, u: Tensor) -> None:
    dx, dA, dB = torch.ops.halfbyte.lora_linear_4bit_backward(g, x, u, *case.args, True)
    assert all(grad.dtype == torch.float32 for grad in (*dA, *dB))
    how, exact_x = served(case, x), x.double()
    exact, size, by_v = (torch.zeros_like(exact_x) for _ in range(3))
    got, column = zip(dA, dB, strict=True), 0
    for w, g_i, adapter in zip(
        case.weights, g.double().split([len(w) for w in case.weights], 1), case.adapters, strict=True
    ):
        w = how.joint(w)
        exact, size = exact + g_i @ w, size + g_i.abs() @ w.abs()
        if adapter is None:
            continue
        a, b, s = how.joint(adapter[0]), how.adapter(adapter[1] * adapter[2]), adapter[2]
        v, v_size = g_i @ b, g_i.abs() @ b.abs()
        exact, size, by_v = exact + v @ a, size + v_size @ a.abs(), by_v + v.abs() @ a.abs()
        u_i = how.adapter(u[:, column : column + len(a)])
        column += len(a)
        grad_a, grad_b = next(got)
        rounding = EPS[x.dtype] * v.abs().t() @ exact_x.abs() if how.pairs else 0.0  # v is rounded, too
        close(grad_a, v.t() @ exact_x, v_size.t() @ exact_x.abs() + rounding / SUM_BOUND, x.dtype, how.once)
        close(grad_b, s * g_i.t() @ u_i, abs(s) * g_i.abs().t() @ u_i.abs(), x.dtype, how.once)
    rounding = EPS[x.dtype] * by_v if how.pairs and how.tiles else 0.0
    close(dx, exact, size + rounding / SUM_BOUND, x.dtype, how.once)
    none, again_a, again_b = torch.ops.halfbyte.lora_linear_4bit_backward(g, x, u, *case.args, False)
    assert none.numel() == 0
    assert all(torch.equal(one, two) for one, two in zip((*dA, *dB), (*again_a, *again_b), strict=True))


def check(case: Case, tokens: int, dtype: torch.dtype) -> None:
    width = sum(len(w) for w in case.weights)
    x, g = torch.randn(tokens, case.weights[0].shape[1]).to(dtype), torch.randn(tokens, width).to(dtype)
    check_backward(case, g, x, check_forward(case, x))


GROUPS: list[tuple[int, list[tuple[int, int]], int]] = [
    (64, [(64, 8)], 64),
    (576, [(576, 16), (192, 16), (192, 16)], 64),
    (128, [(37, 4), (300, 0), (5, 3), (64, 64)], 64),
    (1056, [(129, 1), (70, 33)], 32),
    (1536, [(33, 0)], 512),
    (40, [(33, 8), (7, 0)], 64),  # blocks cross rows: decoded panels serve
]


@pytest.mark.parametrize("number", range(len(GROUPS)))
def test_groups_equal_the_oracle(isa: str, number: int) -> None:
    cols, members, blocksize = GROUPS[number]
    torch.manual_seed(number)
    for dtype in EPS:
        case = group(cols, members, blocksize, bias_dtype=dtype)
        for tokens in (1, 3, 7, 16, 37, 100):
            check(case, tokens, dtype)


def test_other_formats_and_single_quantization(isa: str) -> None:
    check(group(128, [(96, 8), (40, 8)], quant_type="fp4", nested=False), 21, torch.float32)
    for tokens in (3, 21):
        check(group(192, [(96, 8), (40, 0)], quant_type="int4-asym"), tokens, torch.float32)


def test_large_ranks(isa: str) -> None:
    """The slab of an adapter may be deeper than a tile."""
    for dtype in (torch.float32, torch.bfloat16):
        check(group(64, [(96, 1401), (40, 128)]), 21, dtype)


def test_many_rows_in_parts(isa: str) -> None:
    """More rows than are packed at once."""
    check(group(16384, [(32, 4)]), 300, torch.float16)
    check(group(32, [(16384, 4)], 32), 300, torch.float32)
    check(group(32, [(33, 4)], 32), 2100, torch.bfloat16)


@pytest.mark.parametrize("cols", [64, 40])
def test_no_tokens(isa: str, cols: int) -> None:
    case = group(cols, [(48, 8), (16, 0)])
    x, g = torch.randn(0, cols), torch.randn(0, 64)
    y, u = torch.ops.halfbyte.lora_linear_4bit(x, *case.args)
    assert (y.shape, u.shape) == ((0, 64), (0, 8))
    dx, dA, dB = torch.ops.halfbyte.lora_linear_4bit_backward(g, x, u, *case.args, True)
    assert dx.shape == (0, cols)
    assert torch.equal(dA[0], torch.zeros(8, cols))
    assert torch.equal(dB[0], torch.zeros(48, 8))


@FUSED
def test_threads_change_nothing(isa: str) -> None:
    case = group(1024, [(200, 16), (72, 0), (56, 8)])
    before = torch.get_num_threads()
    try:
        for tokens, dtype in itertools.product((1, 3, 100, 700), (torch.float32, torch.bfloat16)):
            x, g = torch.randn(tokens, 1024).to(dtype), torch.randn(tokens, 328).to(dtype)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                y, u = torch.ops.halfbyte.lora_linear_4bit(x, *case.args)
                dx, dA, dB = torch.ops.halfbyte.lora_linear_4bit_backward(g, x, u, *case.args, True)
                results.append((y, u, dx, *dA, *dB))
            for other in results[1:]:
                assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_not_contiguous(isa: str) -> None:
    case = group(64, [(48, 8), (16, 4)])
    x, g = torch.randn(64, 11).t(), torch.randn(64, 11).t()
    check_backward(case, g, x, check_forward(case, x))


def test_a_stranger_to_the_group(isa: str) -> None:
    """Wrong arguments are refused before a kernel reads past an end."""
    case = group(64, [(48, 8)])
    x, op = torch.randn(3, 64), torch.ops.halfbyte.lora_linear_4bit
    wrong: dict[int, Any] = {
        0: [case.args[0][0][:-1]],
        1: [],
        6: [49],
        7: [torch.zeros(47)],
        8: [torch.randn(8, 65)],
        9: [torch.randn(48, 8, dtype=torch.float64)],
        10: [1.0, 1.0],
    }
    for place, value in wrong.items():
        args = [*case.args[:place], value, *case.args[place + 1 :]]
        with pytest.raises((RuntimeError, ValueError)):
            op(x, *args)
    y, u = op(x, *case.args)
    for bad_g, bad_u in ((y[:, :-1], u), (y[:-1], u), (y.double(), u), (y, u[:, :-1])):
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.halfbyte.lora_linear_4bit_backward(bad_g, x, bad_u, *case.args, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    case = group(64, [(48, 8), (16, 0)], bias_dtype=dtype)
    x, g = torch.randn(12, 64).to(dtype), torch.randn(12, 64).to(dtype)
    torch.library.opcheck(torch.ops.halfbyte.lora_linear_4bit.default, (x, *case.args))
    _, u = torch.ops.halfbyte.lora_linear_4bit(x, *case.args)
    for need_dx in (True, False):
        torch.library.opcheck(torch.ops.halfbyte.lora_linear_4bit_backward.default, (g, x, u, *case.args, need_dx))


def test_the_default_is_its_own_gradient() -> None:
    """The specification's backward against autograd of its forward."""
    case = group(64, [(48, 8), (16, 0), (24, 3)])
    learned = [tensor.requires_grad_() for pair in case.adapters if pair for tensor in pair[:2]]
    x = torch.randn(9, 64, requires_grad=True)
    members = lora_linear._members(case.args, 64)
    y, u = lora_linear._plain_forward(x, members)
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *learned], g)
    with torch.no_grad():
        dx, dA, dB = lora_linear._plain_backward(g, x, u, members, True)
    for mine, theirs in zip([dx, dA[0], dB[0], dA[1], dB[1]], grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
