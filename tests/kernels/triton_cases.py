"""The Triton kernels against the plain-torch reference. Not collected: its device is chosen before Triton is imported.

With TRITON_INTERPRET=1 (`test_triton.py` runs it so) the kernels run in Triton's interpreter on the CPU, without it on
the GPU: ``python -m pytest tests/kernels/triton_cases.py``, which `scripts/bench --device cuda` begins with.

The interpreter cannot say everything. It truncates float32 to bfloat16 (a GPU rounds to nearest even), misreads
bfloat16 subnormals, and multiplies bfloat16 matrices as if their bits were integers: so bfloat16 products, and
subnormals in bfloat16, are tested on GPUs only, and `test_triton.py` reads the rounding off the compiled code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halfbyte.config.formats import constants_of
from halfbyte.quant.absmax import compress_absmax
from halfbyte.quant.reference import dequantize_reference, quantize_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from halfbyte.kernels import adamw, cross_entropy, gated, norm, rope  # noqa: E402
from halfbyte.kernels.group import Member  # noqa: E402
from halfbyte.kernels.triton import codec, group, layer, linear, loss, tiles  # noqa: E402
from halfbyte.kernels.triton.adamw import adamw_  # noqa: E402

HALF = torch.float16
DTYPES = [torch.float32, HALF] if INTERPRETED else [torch.float32, HALF, torch.bfloat16]
SHAPES = [(127, 129), (33, 64), (5000,), (3, 5), (1,), (0,)]

# numpy, which the interpreter computes with, warns of float16's infinities and of NaN.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning") for what in ("overflow", "invalid value")]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, in dtype and shape too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def decoded(*args: object) -> Tensor:
    """The reference's values, with the interpreter's truncation where it is what runs."""
    if args[-1] != torch.bfloat16 or not INTERPRETED:
        return dequantize_reference(*args)  # type: ignore[arg-type]
    exact = dequantize_reference(*args[:-1], torch.float32)  # type: ignore[arg-type]
    return (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def weight_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random, with a block of zeros, -0.0, ties, and (but in bfloat16) subnormals."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    flat = weight.view(-1)
    flat[64:128] = 0.0
    flat[128:160] = -0.0
    flat[160:192] *= 1e-30 if dtype == torch.bfloat16 else 1e-39
    flat[192:224] = torch.randint(-8, 9, flat[192:224].shape) / 8
    return weight.to(dtype).to(DEVICE)


@pytest.mark.parametrize(
    ("quant_type", "blocksize"),
    [("nf4", 32), ("nf4", 64), ("fp4", 64), ("fp4", 4096), ("int4-asym", 32), ("int4-asym", 64)],
)
def test_codec_equals_reference(quant_type: str, blocksize: int) -> None:
    for shape, dtype in zip(SHAPES, [torch.float32, torch.bfloat16, HALF] * 2, strict=True):
        weight = weight_of(shape, dtype)
        codes, absmax = quantize_reference(weight, quant_type, blocksize)
        if quant_type != "int4-asym":  # which has no kernel
            codes_of_kernel, absmax_of_kernel = codec.quantize(weight, quant_type, blocksize)
            assert same_bits(codes_of_kernel, codes), (shape, dtype)
            assert same_bits(absmax_of_kernel, absmax), (shape, dtype)
        absmax[::3].neg_()  # of either sign, as `quant.scale` may choose them
        nested_codes, nested_absmax, offset = compress_absmax(absmax, constants_of(quant_type))
        for scales in ((absmax, None, 0.0), (nested_codes, nested_absmax, offset)):
            for out_dtype in (torch.float32, HALF):
                packed = (codes, *scales, quant_type, blocksize)
                assert same_bits(codec.dequantize(packed, shape, out_dtype), decoded(*packed, shape, out_dtype)), (
                    shape,
                    out_dtype,
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF])
def test_every_code_and_scale(dtype: torch.dtype) -> None:
    """Every byte, under scales that overflow float16 and round in every way; every 8-bit scale, too."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(64)
    few = 20 if dtype == torch.bfloat16 and INTERPRETED else 45
    scales = torch.logspace(-few, 38, codes.numel() * 2 // 32, device=DEVICE)
    nested = torch.arange(codes.numel() * 2 // 32, device=DEVICE).to(torch.uint8)
    second = torch.tensor([0.37, 1.3, 2.9, 1e-3], device=DEVICE)
    for packed in ((codes, scales, None, 0.0, "nf4", 32), (codes, nested, second, 0.043, "fp4", 32)):
        args = (*packed, (codes.numel() * 2,), dtype)
        assert same_bits(codec.dequantize(packed, args[-2], dtype), decoded(*args))


def test_a_nan_shows_in_its_scale() -> None:
    """hb.quantize counts NaN and Inf when a scale is not finite, so a scale must not hide one."""
    weight = torch.randn(256, device=DEVICE)
    weight[70], weight[140] = float("nan"), float("inf")
    _, absmax = codec.quantize(weight, "nf4", 64)
    assert torch.isfinite(absmax).tolist() == [True, False, False, True]
    assert absmax[1].isnan()


def packed_weight(rows: int, cols: int, quant_type: str, blocksize: int, double_quant: bool) -> tuple[tuple, Tensor]:
    """A random weight with scales of either sign, packed, and its decoded values in float64."""
    torch.manual_seed(rows + cols)
    codes, absmax = quantize_reference(torch.randn(rows, cols, device=DEVICE), quant_type, blocksize)
    absmax[::3].neg_()
    scales = compress_absmax(absmax, constants_of(quant_type)) if double_quant else (absmax, None, 0.0)
    packed = (codes, *scales, quant_type, blocksize)
    return packed, dequantize_reference(*packed, (rows, cols), torch.float64)


def check(result: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """float32: sums of up to 2,048 terms. Halves: weight and result rounded once each. `magnitude` is |x| |W|^T.

    Measured in the interpreter: 3e-7 in float32, 4.2e-4 in float16; in bfloat16 (one row only) 1.6e-3.
    """
    bound = {torch.float32: 1e-6, HALF: 1.5e-3, torch.bfloat16: 1.2e-2}[result.dtype]
    assert ((result.double() - exact).abs() <= bound * magnitude + 1e-30).all()


# (rows, columns, block size) of W and rows of x: ragged everywhere; blocks wider and narrower than the tiles; one row,
# one tile, two; sums in parts (96 x 1,024); more rows than the tiles serve (130, 300); blocks that cross
# rows (70 x 72).
PRODUCTS = [
    (70, 192, 64, 1), (6, 1120, 32, 1), (5, 4096, 4096, 1),
    (70, 192, 64, 16), (33, 160, 32, 17), (40, 256, 128, 60), (96, 1024, 64, 3), (70, 512, 512, 130),
    (70, 64, 64, 300), (70, 72, 64, 5),
]  # fmt: skip


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype, case: tuple[int, int, int, int], asym: bool) -> None:
    rows, cols, blocksize, m = case
    quant_type, double_quant = ("fp4", False) if cols % 3 else ("nf4", True)
    quant_type = "int4-asym" if asym else quant_type
    packed, exact = packed_weight(rows, cols, quant_type, blocksize, double_quant)
    x = torch.randn(m, cols, device=DEVICE).to(dtype)
    grad = torch.randn(m, rows, device=DEVICE).to(dtype)
    bias = torch.randn(rows, device=DEVICE).to(dtype)
    product, magnitude = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    check(linear.linear(x, packed, None, rows), product, magnitude)
    check(linear.linear(x, packed, bias, rows), product + bias.double(), magnitude + bias.double().abs())
    check(linear.linear_dx(grad, packed, cols), grad.double() @ exact, grad.double().abs() @ exact.abs())


def test_one_bfloat16_row() -> None:
    """No matrix unit: the interpreter does this one, its truncation apart."""
    packed, exact = packed_weight(70, 192, "nf4", 64, double_quant=True)
    x = torch.randn(1, 192, device=DEVICE).bfloat16()
    check(linear.linear(x, packed, None, 70), x.double() @ exact.T, x.double().abs() @ exact.abs().T)


def test_what_is_not_contiguous() -> None:
    packed, exact = packed_weight(70, 192, "nf4", 64, double_quant=True)
    wide = torch.randn(5, 400, device=DEVICE)
    x, grad = wide[:, 3:195], wide[:, ::2][:, :70]
    check(linear.linear(x, packed, wide[0, ::2][:70], 70), x.double() @ exact.T + wide[0, ::2][:70].double(),
          x.double().abs() @ exact.abs().T)  # fmt: skip
    check(linear.linear_dx(grad, packed, 192), grad.double() @ exact, grad.double().abs() @ exact.abs())
    spread = torch.empty(packed[0].numel() * 2, dtype=torch.uint8, device=DEVICE)[::2].copy_(packed[0])
    assert same_bits(
        codec.dequantize((spread, *packed[1:]), (70, 192), torch.float32),
        dequantize_reference(*packed, (70, 192), torch.float32),
    )


@pytest.mark.parametrize(("rows", "cols", "m"), [(4096, 4096, 8), (4096, 14336, 64), (1024, 4096, 40), (64, 64, 2)])
def test_parts_of_a_sum_cover_it_once(rows: int, cols: int, m: int) -> None:
    for choose, depth in ((tiles.forward_tiling, cols), (tiles.backward_tiling, rows)):
        for dtype in (torch.float32, HALF):
            tiling = choose(m, rows, cols, dtype)
            part = linear._part(tiling, depth)
            assert part % tiling.depth == 0
            assert (tiling.parts - 1) * part < depth <= tiling.parts * part


@pytest.mark.parametrize("m", [5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_every_tile_that_is_tried_is_right(m: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on a GPU to the same bits: which one was fastest must not show in a result."""
    rows, cols = 136, 256
    packed, exact = packed_weight(rows, cols, "nf4", 64, double_quant=True)
    x, grad = torch.randn(m, cols, device=DEVICE).to(dtype), torch.randn(m, rows, device=DEVICE).to(dtype)
    forward = (linear.linear, x, packed, None, rows), (x.double() @ exact.T, x.double().abs() @ exact.abs().T)
    backward = (linear.linear_dx, grad, packed, cols), (grad.double() @ exact, grad.double().abs() @ exact.abs())
    for direction, ((product, *arguments), expected) in {"forward": forward, "backward": backward}.items():
        whole = getattr(tiles, f"{direction}_tiling")(m, rows, cols, dtype)
        kernel, found = getattr(linear, f"{direction}_kernel"), []
        for tile in whole.tiles:
            only = replace(whole, tiles=(tile,))
            tuned = linear._tuned(kernel, "x" if direction == "forward" else "grad", lambda *_, only=only: only)
            with monkeypatch.context() as patch:
                patch.setattr(linear, f"tuned_{direction}", tuned)
                found.append(product(*arguments))
            check(found[-1], *expected)
        assert INTERPRETED or all(same_bits(result, found[0]) for result in found)


@pytest.mark.skipif(not INTERPRETED, reason="sets the times, which a GPU would tell")
def test_the_fastest_tile_is_found_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, exact = packed_weight(160, 256, "nf4", 64, double_quant=True)
    timed: list[float] = []

    def each_faster_than_the_last(run: Callable[[], object], quantiles: object) -> list[float]:
        run()
        timed.append(1.0 / (len(timed) + 1))
        return [timed[-1]] * 3

    tuned = linear._tuned(linear.forward_kernel, "x", tiles.forward_tiling)
    tuned._do_bench = each_faster_than_the_last
    monkeypatch.setattr(linear, "tuned_forward", tuned)
    monkeypatch.setattr(linear, "_can_time", lambda x: True)
    tried = tiles.forward_tiling(64, 160, 256, HALF).tiles
    for m in (20, 40, 64):
        x = torch.randn(m, 256, device=DEVICE, dtype=HALF)
        check(linear.linear(x, packed, None, 160), x.double() @ exact.T, x.double().abs() @ exact.abs().T)
        assert len(timed) == len(tried) > 1
        assert tuned.best_config.kwargs == {"BLOCK_M": tried[-1].rows, "BLOCK_N": tried[-1].columns}
    linear.linear(torch.randn(3, 256, device=DEVICE, dtype=HALF), packed, None, 160)
    assert len(timed) > len(tried)  # other tiles for fewer rows


@pytest.mark.skipif(not INTERPRETED, reason="sets programs' numbers, which only the interpreter lets one")
def test_programs_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program of each kernel, as if thousands of millions of elements lay before its own.

    The memory is asked for and never touched but for the last pages, so it costs addresses only.
    """
    from triton.runtime.interpreter import interpreter_builder

    def program(x: int, y: int = 0) -> None:
        """What the kernels launched from here on take for their number."""
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *_: None)
        interpreter_builder.grid_idx = (x, y, 0)

    table, dynamic = linear.device_tables("nf4", 64, torch.device("cpu"))
    count = 2**32 + 1024
    codes = torch.empty(count // 2, dtype=torch.uint8)
    codes[-512:] = torch.randint(256, (512,)).to(torch.uint8)
    absmax = torch.empty(count // 64)
    absmax[-16:] = torch.rand(16)
    tail = (codes[-512:], absmax[-16:], None, 0.0, "nf4", 64)
    weight = (codes, absmax, absmax, table.values, dynamic, 0.0)
    numbers = {"BLOCKSIZE": 64, "NESTED": False, "OFFSETS": False}

    out = torch.empty(count, dtype=HALF)
    program(count // 1024 - 1)
    codec.dequantize_kernel[(1,)](*weight, out, count, count // 2, **numbers, RUNS=32)
    assert same_bits(out[-1024:], dequantize_reference(*tail, (1024,), HALF))

    written, scales = torch.empty_like(codes), torch.empty_like(absmax)
    codec.quantize_kernel[(1,)](
        out, table.boundaries, table.order, written, scales, count, count // 2, 7, BLOCKSIZE=64, BLOCKS=16
    )
    codes_ref, absmax_ref = quantize_reference(out[-1024:], "nf4", 64)
    assert same_bits(written[-512:], codes_ref)
    assert same_bits(scales[-16:], absmax_ref)

    rows, exact = count // 64, dequantize_reference(*tail, (16, 64), torch.float64)
    x, y = torch.randn(1, 64), torch.empty(1, rows)
    program(rows // 4 - 1)
    linear.vector_kernel[(1,)](x, *weight, x, y, rows, 64, **numbers, BIAS=False, BLOCK_R=4, BLOCK_C=64)
    check(y[:, -4:], x.double() @ exact[-4:].T, x.double().abs() @ exact[-4:].abs().T)
    program(rows // 16 - 1)
    blocks = {"MOST_ROWS": 16, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64}
    turned = {**blocks, "BLOCK_N": 64, "BLOCK_K": 16}
    linear.forward_kernel[(1,)](x, *weight, x, y, 1, rows, 64, 64, **numbers, BIAS=False, **blocks)
    check(y[:, -16:], x.double() @ exact.T, x.double().abs() @ exact.abs().T)

    # As many rows of x: its elements and the result's lie beyond 2^31, the weight's do not.
    many, product = out.view(-1, 64), torch.empty(count // 64, 16, dtype=HALF)
    near = (codes[-512:], absmax[-16:], absmax[-16:], *weight[3:])
    x = many[-16:].float()
    program(0, many.shape[0] // 16 - 1)
    linear.forward_kernel[(1,)](many, *near, many, product, many.shape[0], 16, 64, 64, **numbers, BIAS=False, **blocks)
    check(product[-16:], x.double() @ exact.T, x.double().abs() @ exact.abs().T)
    back = torch.empty_like(many)
    linear.backward_kernel[(1,)](product, *near, back, many.shape[0], 16, 64, 16, **numbers, **turned)
    grad = product[-16:].double()
    check(back[-16:], grad @ exact, grad.abs() @ exact.abs())

    cols = count // 4  # four rows, the last of them beyond 2^31 elements
    dx, grad = torch.empty(1, cols), torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    program(cols // 64 - 1)
    linear.backward_kernel[(1,)](grad, *weight, dx, 1, 4, cols, 16, **numbers, **turned)
    assert torch.equal(dx[0, -64:], exact[-1].float())


@pytest.mark.skipif(INTERPRETED, reason="no CUDA device: 2^31 elements take the interpreter hours")
def test_weight_beyond_two_to_the_31() -> None:
    rows, cols = 2**25 + 32, 64
    codes = torch.randint(256, (rows * cols // 2,), dtype=torch.uint8, device=DEVICE)
    absmax = torch.rand(rows, device=DEVICE)
    packed, last = (codes, absmax, None, 0.0, "nf4", 64), (codes[-1024:], absmax[-32:], None, 0.0, "nf4", 64)
    exact = dequantize_reference(*last, (32, cols), torch.float32)
    assert same_bits(codec.dequantize(packed, (rows, cols), HALF)[-32:], exact.to(HALF))
    x = torch.randn(2, cols, device=DEVICE)
    for m in (1, 2):
        y = linear.linear(x[:m], packed, None, rows)[:, -32:]
        check(y, x[:m].double() @ exact.double().T, x[:m].double().abs() @ exact.double().abs().T)


@pytest.mark.parametrize("bits", [32, 8])
def test_adamw_equals_the_plain_one(bits: int) -> None:
    """Three steps of pages of every kind of length: to the bit, moments and their codes too."""
    torch.manual_seed(0)
    pages = []
    for count in (1, 255, 256, 1500):
        moments = [torch.zeros(count), torch.zeros(count)]
        if bits == 8:
            moments = [torch.zeros(size, dtype=kind) for kind, size in
                       ((torch.uint8, count), (torch.float32, -(-count // 256))) * 2]  # fmt: skip
        pages.append([tensor.to(DEVICE) for tensor in (torch.randn(count), torch.zeros(count), *moments)])
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        for page in pages:
            page[1] = (torch.randn(page[0].numel(), device=DEVICE) * 10 ** torch.randint(-9, 3, ()).item()).to(dtype)
        pages[-1][1][:256] = 0
        expected = [[tensor.clone() for tensor in page] for page in pages]
        numbers = (1e-2, 0.9, 0.999, 1e-8, 0.1, 3)
        plain = adamw.plain_adamw_8bit_ if bits == 8 else adamw.plain_adamw_32bit_
        plain(*(list(tensors) for tensors in zip(*expected, strict=True)), *numbers)
        adamw_([tuple(page) for page in pages], adamw.Numbers.of(*numbers))
        for page, exact in zip(pages, expected, strict=True):
            assert all(same_bits(a, b) for a, b in zip(page, exact, strict=True))


ROUNDING = {torch.float32: 2e-6, HALF: 2e-3, torch.bfloat16: 2e-2}
"""Of the largest element; measured in the interpreter: 3e-7 and 5e-4 at most."""


def agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert (one.double() - other.double()).abs().max() <= ROUNDING[dtype] * other.double().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 576, 1000])
def test_norms(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta, g = (torch.randn(2, 3, columns, device=DEVICE).to(dtype) for _ in range(3))
    weight = torch.randn(columns, device=DEVICE)
    total, out, rstd = layer.rms_norm(x, None, weight, 1e-5, 0.0)
    assert total is x
    agree((out, rstd), norm.plain_rms_norm(x, weight, 1e-5, 0.0), dtype)
    agree(layer.rms_norm(x, delta, weight, 1e-5, 1.0), norm.plain_add_rms_norm(x, delta, weight, 1e-5, 1.0), dtype)
    for add in (None, delta):
        dx = layer.rms_norm_backward(g, x, weight, rstd, 1.0, add)
        agree((dx,), (norm.plain_rms_norm_backward(g, x, weight, rstd, 1.0, add),), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up, g = 3 * torch.randn(5, 2 * 1100, device=DEVICE), torch.randn(5, 1100, device=DEVICE)
    gate_up[0, :4] = torch.tensor([30.0, -30.0, 100.0, -100.0])
    gate_up, g = gate_up.to(dtype), g.to(dtype)
    agree((layer.gated(gate_up, activation),), (gated.plain_gated(gate_up, activation),), dtype)
    agree(layer.gated_backward(g, gate_up, activation), gated.plain_gated_backward(g, gate_up, activation), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [16, 12])
def test_rope(rotary_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 6 * 16, device=DEVICE).to(dtype)
    cos, sin = (torch.randn(7, rotary_dim, device=DEVICE) for _ in range(2))
    for inverse in (False, True):
        found, expected = rows.clone(), rows.clone()
        layer.rope_(found, cos, sin, 5, 16, inverse=inverse)
        rope.plain_rope_(expected, cos, sin, 5, 16, inverse)
        agree((found,), (expected,), dtype)
        assert same_bits(found[:, 5 * 16 :], rows[:, 5 * 16 :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [100, 9000])
def test_softmax_cross_entropy(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(4, vocab, device=DEVICE)).to(dtype)
    logits[1, :50] = float("-inf")
    targets = torch.tensor([0, 60, vocab - 1, 7], device=DEVICE)
    found, expected = logits.clone(), logits.clone()
    total, expected_total = (
        loss.softmax_cross_entropy_(found, targets), cross_entropy.plain_softmax_cross_entropy_(expected, targets)
    )  # fmt: skip
    torch.testing.assert_close(total, expected_total, rtol=1e-6, atol=0)
    agree((found,), (expected,), dtype)
    targets[2] = vocab
    assert loss.softmax_cross_entropy_(logits.clone(), targets).isnan()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("count", "quant_type"), [(1, "nf4"), (2, "nf4"), (3, "nf4"), (3, "int4-asym")])
def test_a_groups_matrices(count: int, quant_type: str, nested: bool) -> None:
    """Weights to the bit as each by itself; adapters as torch puts them together, one member without."""
    torch.manual_seed(0)
    rows, columns = (48, 33, 5)[:count], 64
    members = []
    for number, out in enumerate(rows):
        codes, absmax = quantize_reference(torch.randn(out, columns, device=DEVICE), quant_type, 32)
        scales = compress_absmax(absmax, constants_of(quant_type)) if nested else (absmax, None, 0.0)
        lora = [torch.randn(4 + number, columns, device=DEVICE), torch.randn(out, 4 + number, device=DEVICE)]
        pair = lora if number != 1 else [None, None]
        members.append(Member((codes, *scales, quant_type, 32), out, None, *pair, 0.5 + number))
    assert group.knows(members, columns)
    for dtype in (torch.float32, HALF):
        expected = torch.cat([codec.dequantize(m.weight, (m.out_features, columns), dtype) for m in members])
        assert same_bits(group.weights(members, columns, dtype), expected)
        a, b = group.adapters(members, columns, dtype)
        scaled = [
            torch.zeros(m.out_features, 0, device=DEVICE) if m.lora_B is None else m.scaling * m.lora_B
            for m in members
        ]
        assert same_bits(a, torch.cat([m.lora_A for m in members if m.lora_A is not None]).to(dtype))
        assert same_bits(b, torch.block_diag(*scaled).to(dtype))
