"""The native codec equals the plain-torch reference and bitsandbytes, bit for bit, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import halfbyte.kernels as kernels
from halfbyte.config.formats import bits_of, constants_of
from halfbyte.kernels import cpu
from halfbyte.kernels.registry import cpu_choice
from halfbyte.quant import reference
from halfbyte.quant.absmax import compress_absmax, quantize_8bit_reference
from halfbyte.quant.blocks import num_constants
from halfbyte.quant.codebook import Codebook, dynamic_boundaries
from halfbyte.quant.reference import dequantize_reference, quantize_reference
from halfbyte.quant.scales import codes_for_scales, codes_for_scales_reference, least_error_scales_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SHAPES = [(64, 64), (128, 96), (3, 5), (127, 129), (1,), (0,), (7, 0), (33, 64), (5000,), (2, 3, 67)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit (0.0 is not -0.0), in dtype and shape too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def weight_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random, with what breaks codecs: zero blocks, -0.0, subnormals, ties, a very small block."""
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    flat = weight.view(-1)
    flat[64:128] = 0.0
    flat[128:160] = -0.0
    flat[160:192] *= 1e-39
    flat[192:224] = torch.randint(-8, 9, flat[192:224].shape) / 8
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4", "int4-asym", "int8", "nf3", "nf2"])
def test_codec_equals_reference(isa: str, quant_type: str, blocksize: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = weight_of(shape, dtype)
        codes, absmax = torch.ops.halfbyte.quantize_4bit(weight, quant_type, blocksize)
        codes_ref, absmax_ref = quantize_reference(weight, quant_type, blocksize)
        assert same_bits(codes, codes_ref), shape
        assert same_bits(absmax, absmax_ref), shape
        absmax[::3].neg_()  # of either sign, as `quant.scale` may choose them
        nested_codes, nested_absmax, offset = compress_absmax(absmax, constants_of(quant_type))
        for scales in ((absmax, None, 0.0), (nested_codes, nested_absmax, offset)):
            for out_dtype in DTYPES:
                args = (codes, *scales, quant_type, blocksize, list(shape), out_dtype)
                value = torch.ops.halfbyte.dequantize_4bit(*args)
                assert same_bits(value, dequantize_reference(*args)), (shape, out_dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4", "int4-asym", "int8", "nf3", "nf2"])
def test_all_codes_and_extreme_scales(isa: str, quant_type: str) -> None:
    """Every byte, under scales that overflow fp16, underflow bf16, and round in every way."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(96)
    count = codes.numel() * 8 // bits_of(quant_type)
    scales = torch.logspace(-45, 38, constants_of(quant_type) * count // 32)
    for dtype in DTYPES:
        args = (codes, scales, None, 0.0, quant_type, 32, [count], dtype)
        assert same_bits(torch.ops.halfbyte.dequantize_4bit(*args), dequantize_reference(*args))


@pytest.mark.parametrize("zero", [0, 9])
def test_any_table_of_sixteen_values(isa: str, zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take values, midpoints and order as they are given: quantize, decode, multiply."""
    values = torch.tensor(
        [0.0, -1.0, 0.7, 1.0, -0.6, 0.5, 0.4, -0.33, -0.27, 0.3, -0.2, 0.21, 0.12, -0.1, 0.05, -0.04]
    )
    values = values.roll(zero)
    order = torch.argsort(values)
    ascending = values[order]
    table = Codebook(values, (ascending[1:] + ascending[:-1]) / 2, order.to(torch.uint8), zero)
    for module in (reference, cpu):
        monkeypatch.setattr(module, "codebook", lambda name, size: {"mine": table}[name])
    weight = weight_of((33, 128), torch.float32)
    codes, absmax = torch.ops.halfbyte.quantize_4bit(weight, "mine", 64)
    codes_ref, absmax_ref = quantize_reference(weight, "mine", 64)
    assert same_bits(codes, codes_ref)
    assert same_bits(absmax, absmax_ref)
    args = (codes, absmax, None, 0.0, "mine", 64)
    decoded = dequantize_reference(*args, (33, 128), torch.float32)
    assert same_bits(torch.ops.halfbyte.dequantize_4bit(*args, [33, 128], torch.float32), decoded)
    for m in (1, 40):
        x = torch.randn(m, 128)
        y, exact = torch.ops.halfbyte.linear_4bit(x, *args, 33, None).double(), x.double() @ decoded.double().t()
        assert ((y - exact).abs() <= 1e-6 * x.double().abs() @ decoded.double().abs().t()).all()  # as in test_linear


def test_every_sixteen_bit_pattern(isa: str) -> None:
    """Widening is exact for every finite bf16 and fp16 number, subnormals included."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        weight = every[torch.isfinite(every)]
        codes, absmax = torch.ops.halfbyte.quantize_4bit(weight, "nf4", 32)
        codes_ref, absmax_ref = quantize_reference(weight, "nf4", 32)
        assert same_bits(codes, codes_ref)
        assert same_bits(absmax, absmax_ref)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_equals_bitsandbytes(isa: str, quant_type: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(3)
    for trial in range(24):
        rows, cols = (int(torch.randint(1, 200, (), generator=generator)) for _ in range(2))
        blocksize, dtype = BLOCKSIZES[trial % 7], DTYPES[trial % 3]  # 4096 and odd columns: its own fallbacks
        weight = torch.randn(rows, cols, generator=generator).to(dtype)
        packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
        codes, absmax = torch.ops.halfbyte.quantize_4bit(weight, quant_type, blocksize)
        assert torch.equal(codes, packed.reshape(-1)), (rows, cols, blocksize)
        assert torch.equal(absmax, state.absmax)
        theirs = functional.dequantize_4bit(packed, state)
        ours = torch.ops.halfbyte.dequantize_4bit(codes, absmax, None, 0.0, quant_type, blocksize, [rows, cols], dtype)
        assert torch.equal(ours, theirs), (rows, cols, blocksize, dtype)


def test_equals_bitsandbytes_double_quant(isa: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for rows, cols in ((64, 64), (640, 300), (1024, 576)):
        weight = weight_of((rows, cols), torch.bfloat16)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        ours = torch.ops.halfbyte.dequantize_4bit(
            packed, state.absmax, state.state2.absmax, float(state.offset), "nf4", 64, [rows, cols], torch.bfloat16
        )
        assert torch.equal(ours, functional.dequantize_4bit(packed, state))


def test_eight_bits_equal_the_reference(isa: str) -> None:
    """Ragged sizes; blocks of zeros, of one value, of subnormals; numbers on and beside every boundary."""
    bounds = dynamic_boundaries()
    edges = (bounds, bounds.nextafter(torch.ones(1)), bounds.nextafter(-torch.ones(1)))
    cases = [torch.randn(n) for n in (0, 1, 255, 256, 257, 100_003)]
    cases += [torch.zeros(300), torch.full((300,), -0.25), torch.randn(300) * 1e-40]
    cases += [torch.cat([torch.ones(1), edge]) for edge in edges]  # the 1 makes the scale 1
    for x in cases:
        codes, absmax = torch.ops.halfbyte.quantize_8bit(x)
        codes_ref, absmax_ref = quantize_8bit_reference(x)
        assert same_bits(codes, codes_ref)
        assert same_bits(absmax, absmax_ref)


def test_non_contiguous_inputs(isa: str) -> None:
    weight = torch.randn(130, 96).t()
    codes, absmax = torch.ops.halfbyte.quantize_4bit(weight, "nf4", 64)
    codes_ref, absmax_ref = quantize_reference(weight.contiguous(), "nf4", 64)
    assert same_bits(codes, codes_ref)
    assert same_bits(absmax, absmax_ref)
    strided = torch.stack([codes, codes], dim=1)[:, 0]
    args = (absmax, None, 0.0, "nf4", 64, [96, 130], torch.float32)
    assert same_bits(torch.ops.halfbyte.dequantize_4bit(strided, *args), dequantize_reference(codes, *args))


def test_thread_count_changes_nothing(isa: str) -> None:
    weight = torch.randn(1000, 517).bfloat16()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            codes, absmax = torch.ops.halfbyte.quantize_4bit(weight, "nf4", 64)
            value = torch.ops.halfbyte.dequantize_4bit(
                codes, absmax, None, 0.0, "nf4", 64, [1000, 517], torch.bfloat16
            )
            results.append((codes, absmax, value, kernels.count_nonfinite(weight / 0)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result[:3], results[0][:3], strict=True))
        assert result[3] == results[0][3] == weight.numel()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_count_nonfinite(isa: str, dtype: torch.dtype) -> None:
    tensor = torch.randn(301, 77).to(dtype)
    assert kernels.count_nonfinite(tensor) == 0
    tensor[3, 5] = torch.nan
    tensor[100:104, 76] = torch.inf
    tensor[300, 76] = -torch.inf
    assert kernels.count_nonfinite(tensor) == 6
    assert kernels.count_nonfinite(tensor.t()) == 6
    assert kernels.count_nonfinite(tensor[:0]) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_weight_shows_in_absmax(isa: str, value: float) -> None:
    """A NaN or Inf anywhere in a block makes its scale NaN or Inf: no second pass is needed to find it."""
    for position in (0, 17, 63, 200, 330):
        weight = torch.randn(331)
        weight[position] = value
        _, absmax = torch.ops.halfbyte.quantize_4bit(weight, "nf4", 64)
        assert [int(i) for i in (~torch.isfinite(absmax)).nonzero()] == [position // 64]


def test_wrong_sizes_are_refused(isa: str) -> None:
    codes, absmax = torch.ops.halfbyte.quantize_4bit(torch.randn(64, 64), "nf4", 64)
    if cpu_choice().library is None:
        pytest.skip("the native library is not built")
    for bad in ((codes[:-1], absmax), (codes, absmax[:-1])):
        with pytest.raises(ValueError, match="for"):
            torch.ops.halfbyte.dequantize_4bit(*bad, None, 0.0, "nf4", 64, [64, 64], torch.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("quant_type", "blocksize"), [("nf4", 32), ("nf4", 64), ("nf4", 4096), ("int4-asym", 64), ("int4-asym", 4096)]
)
def test_scales_of_least_error_are_as_good_as_the_reference(
    isa: str, quant_type: str, blocksize: int, weighted: bool
) -> None:
    """Sums run in another order, so that candidates that are as good may change places: what counts is the error,
    which was at most 1e-5 of itself away (ties in bfloat16, one block of 64)."""
    for shape in ((64, 64), (127, 129), (3, 5), (1,), (0,), (2, 3, 67)):
        for dtype in DTYPES:
            weight = weight_of(shape, dtype)
            importance = torch.rand(shape[-1]) + 0.01 if weighted else None
            args = (weight, quant_type, blocksize, True, importance)
            found, wanted = torch.ops.halfbyte.least_error_scales(*args), least_error_scales_reference(*args)
            assert found.shape == wanted.shape
            errors = [_weighted_error(weight, scales, quant_type, blocksize, importance) for scales in (found, wanted)]
            assert errors[0] == pytest.approx(errors[1], rel=1e-4, abs=1e-12), (shape, dtype)


def _weighted_error(
    weight: Tensor, scales: Tensor, quant_type: str, blocksize: int, importance: Tensor | None
) -> float:
    codes = codes_for_scales(weight, scales, quant_type, blocksize)
    decoded = dequantize_reference(codes, scales, None, 0.0, quant_type, blocksize, tuple(weight.shape), torch.float32)
    wrong = (decoded - weight.float()).square()
    return float((wrong if importance is None else wrong * importance).sum())


def test_a_scale_of_least_error_is_not_finite_where_the_weight_is_not(isa: str) -> None:
    weight = torch.randn(4, 64)
    weight[1, 5], weight[3, 0] = float("nan"), float("-inf")
    scales = torch.ops.halfbyte.least_error_scales(weight, "nf4", 64, True, None)
    assert scales.isfinite().tolist() == [True, False, True, False]


def test_every_instruction_set_finds_the_same_scales(isa: str) -> None:
    """A base that is quantized as it is loaded is the same on every machine, and so is the hash an adapter records."""
    library = cpu_choice().library
    assert library is not None
    weight, importance = torch.randn(33, 67), torch.rand(67) + 0.01
    for quant_type, blocksize, h in (("nf4", 64, None), ("bof4-s", 32, importance), ("nf3", 4096, importance),
                                     ("int4-asym", 64, None), ("int4-asym", 32, importance)):  # fmt: skip
        found = []
        for name in (isa, "baseline"):
            library.force(name)
            found.append(torch.ops.halfbyte.least_error_scales(weight, quant_type, blocksize, True, h))
        assert same_bits(*found)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4", "int4-asym", "nf3", "int8"])
def test_codes_for_scales_are_the_reference_s(isa: str, quant_type: str) -> None:
    for shape in ((64, 64), (127, 129), (3, 5), (1,), (0,), (2, 3, 67)):
        for dtype in DTYPES:
            weight = weight_of(shape, dtype)
            scales = torch.randn(num_constants(weight.numel(), 64, quant_type))
            scales[::5] = 0.0
            found = torch.ops.halfbyte.codes_for_scales(weight, scales, quant_type, 64)
            assert torch.equal(found, codes_for_scales_reference(weight, scales, quant_type, 64)), (shape, dtype)


def test_codes_for_too_few_scales_are_refused(isa: str) -> None:
    with pytest.raises(ValueError, match=r"1 torch\.float32 scales for 2 blocks"):
        torch.ops.halfbyte.codes_for_scales(torch.randn(128), torch.ones(1), "nf4", 64)
