"""Quantizing by the rules of docs/format.md: what is refused, ragged sizes, zeros, slices, files of others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.config import QuantConfig
from halfbyte.config.formats import QUANT_TYPES
from halfbyte.errors import ConfigError, ModelError
from halfbyte.quant import QuantizedWeight, bits_per_weight, quantize, quantize_slices, quantized_bytes, slice_rows
from halfbyte.quant.nibbles import pack_nibbles, unpack_nibbles

NF4_WIDEST_STEP = 0.3038073
"""The widest gap between neighbouring NF4 values (-1 and -0.696), so a weight is at most half of it off its scale."""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused_wherever_it_stands(backend: str, value: float) -> None:
    """Every position of the first two blocks, of the short last one, and of its odd last element."""
    clean = torch.randn(64 * 2 + 31, generator=torch.Generator().manual_seed(0))
    for position in range(clean.numel()):
        weight = clean.clone()
        weight[position] = value
        with pytest.raises(ModelError, match=r"^layers\.3\.up: has 1 NaN or Inf\. Use a checkpoint"):
            quantize(weight, name="layers.3.up")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite_is_counted_over_slices(backend: str, dtype: torch.dtype) -> None:
    weight = torch.randn(256, 64).to(dtype)
    weight[3, :5] = math.nan
    weight[200, 7] = math.inf
    slices = [weight[:128], weight[128:]]
    with pytest.raises(ModelError, match="w: has 6 NaN or Inf"):
        quantize_slices(slices, (256, 64), dtype, QuantConfig(), name="w")


@pytest.mark.parametrize("bad", [torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.float64)])
def test_other_dtypes_are_refused(bad: Tensor) -> None:
    with pytest.raises(ModelError, match=f"has dtype {bad.dtype}: float32, bfloat16 and float16 are supported"):
        quantize(bad, name="w")


@pytest.mark.parametrize("kwargs", [{"quant_type": "nf5"}, {"blocksize": 16}, {"blocksize": 96}, {"blocksize": 8192}])
def test_unknown_recipe_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        quantize(torch.randn(4, 4), **kwargs)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "shape", [(0,), (1,), (1, 1), (3, 5), (1, 63), (1, 65), (7, 0), (129, 127), (2, 3, 5), (5000,)]
)
def test_odd_sizes(backend: str, shape: tuple[int, ...], double_quant: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    quantized = quantize(weight, double_quant=double_quant)
    back = quantized.dequantize()
    assert back.shape == weight.shape
    assert quantized.nbytes == quantized_bytes(shape, 64, double_quant)
    if weight.numel():
        # Half the widest step of the largest scale; double quantization moves scales by < 1 % of the largest.
        bound = (NF4_WIDEST_STEP / 2 + 0.01 * double_quant) * float(weight.abs().max())
        assert float((back - weight).abs().max()) <= bound * (1 + 1e-6)


def test_zeros(backend: str) -> None:
    """All-zero blocks: code 7, and exactly 0 even when double quantization gives them a scale other than 0."""
    weight = torch.randn(10, 64)
    weight[4] = 0.0
    weight[9, :] = -0.0
    weight = torch.cat([weight.reshape(-1), torch.zeros(31)])  # a short, odd, zero last block
    quantized = quantize(weight)
    codes = quantized.codes
    assert torch.equal(codes[4 * 32 : 5 * 32], torch.full((32,), 0x77, dtype=torch.uint8))
    assert torch.equal(codes[9 * 32 :], torch.full((48,), 0x77, dtype=torch.uint8))
    back = quantized.dequantize()
    assert not back[4 * 64 : 5 * 64].any()
    assert not back[9 * 64 :].any()
    plain = quantize(weight, double_quant=False)
    assert [plain.absmax[i].item() for i in (4, 9, 10)] == [0, 0, 0]


def test_high_nibble_first(backend: str) -> None:
    """-1 is code 0 and +1 code 15: the first element is in the high nibble."""
    assert quantize(torch.tensor([1.0, -1.0, 1.0]), double_quant=False).codes.tolist() == [0xF0, 0xF7]
    codes = torch.arange(15, dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes, 7), 15), codes)


def test_ties_go_to_the_lower_value(backend: str) -> None:
    """A weight on a boundary gets the lower of its two neighbours (as bitsandbytes' strict comparison)."""
    from halfbyte.quant.codebook import codebook

    table = codebook("nf4", 64)
    weight = torch.cat([torch.ones(1), table.boundaries])  # the 1 makes the scale 1
    found = unpack_nibbles(quantize(weight, double_quant=False, scale="absmax").codes, 16)
    assert found.tolist() == [15, *range(15)]


@pytest.mark.parametrize("shape", [(100, 64), (64, 48), (130, 33), (512, 7), (1, 5000)])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("scale", ["absmax", "mse", "mse-signed"])
def test_slices_equal_the_whole(shape: tuple[int, int], blocksize: int, double_quant: bool, scale: str) -> None:
    weight = torch.randn(shape).bfloat16()
    config = QuantConfig(blocksize=blocksize, double_quant=double_quant, scale=scale)
    whole = quantize(weight, blocksize=blocksize, double_quant=double_quant, scale=scale)
    rows = slice_rows(shape, blocksize, max_elements=2000)
    assert rows * shape[1] % (2 * blocksize) == 0
    sliced = quantize_slices(weight.split(rows), shape, weight.dtype, config, name="w")
    assert torch.equal(sliced.codes, whole.codes)
    assert torch.equal(sliced.absmax, whole.absmax)
    assert sliced.nested_offset == whole.nested_offset
    assert torch.equal(sliced.dequantize(), whole.dequantize())


def test_slice_rows_stays_within_its_limit() -> None:
    assert slice_rows((50_000, 4096), 64, 8 * 2**20) == 2048
    assert slice_rows((10, 4096), 64, 8 * 2**20) == 2048
    assert slice_rows((100, 3), 64, 8) == 128  # no smaller slice is made of whole pairs of blocks


def test_nothing_of_the_source_is_touched() -> None:
    """Not its values, not its gradient, not its layout."""
    weight = nn.Parameter(torch.randn(64, 32).t())
    before = weight.detach().clone()
    quantized = quantize(weight)
    assert torch.equal(weight, before)
    assert quantized.shape == (32, 64)
    assert not quantized.codes.requires_grad
    assert torch.equal(quantized.codes, quantize(before.contiguous()).codes)


def test_bits_per_weight() -> None:
    assert bits_per_weight(64, True) == pytest.approx(4.127, abs=5e-4)  # QLoRA paper §3
    assert bits_per_weight(64, False) == 4.5
    shape = (4096, 4096)
    for double_quant in (True, False):
        for quant_type in QUANT_TYPES:
            size = quantized_bytes(shape, 64, double_quant, quant_type)
            assert size * 8 / (4096 * 4096) == bits_per_weight(64, double_quant, quant_type)
    assert bits_per_weight(64, True, "int4-asym") == pytest.approx(4.254, abs=5e-4)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bytes_and_pieces_of_every_format(quant_type: str, double_quant: bool) -> None:
    """Of ragged sizes; pieces of rows decode to the same bits, constants of their blocks with them."""
    for shape in ((129, 127), (96, 160), (7, 3)):
        weight = quantize(torch.randn(shape), quant_type=quant_type, blocksize=32, double_quant=double_quant)
        assert weight.nbytes == quantized_bytes(shape, 32, double_quant, quant_type)
        parts = list(weight.row_slices(2048))
        assert sum(part.shape[0] for part in parts) == shape[0]
        assert torch.equal(torch.cat([part.dequantize() for part in parts]), weight.dequantize())


def stored(double_quant: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    weight = quantize(torch.randn(64, 320), double_quant=double_quant)
    return weight.codes, dict(weight.bnb_tensors())


def edit_state(tensors: dict[str, Tensor], **changes: Any) -> None:
    key = "quant_state.bitsandbytes__nf4"
    numbers = json.loads(bytes(tensors[key].tolist())) | changes
    tensors[key] = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)


def test_stored_json_is_bitsandbytes_to_the_letter() -> None:
    _, tensors = stored()
    text = bytes(tensors["quant_state.bitsandbytes__nf4"].tolist()).decode()
    numbers = json.loads(text)
    assert text == json.dumps(numbers)
    assert list(numbers) == [
        "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
    ]  # fmt: skip


def drop(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def edit(**changes: Any) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: edit_state(tensors, **changes)


def put(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.__setitem__(key, change(tensors.get(key, torch.zeros(0))))


def with_inf(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[-1] = math.inf
    return tensor


DAMAGE = {
    "no state": drop("quant_state.bitsandbytes__nf4"),
    "two states": put("quant_state.bitsandbytes__fp4", lambda _: torch.zeros(2, dtype=torch.uint8)),
    "no absmax": drop("absmax"),
    "no nested absmax": drop("nested_absmax"),
    "unknown key": put("extra", lambda t: t),
    "another 4-bit table": put("quant_map", lambda t: t + torch.linspace(0, 0.01, 16)),
    "another dynamic map": put("nested_quant_map", lambda t: t.flip(0)),
    "a short table": put("quant_map", lambda t: t[:8]),
    "a long table": put("nested_quant_map", lambda t: t.repeat(2)),
    "short absmax": put("absmax", lambda t: t[:-1]),
    "absmax of another dtype": put("absmax", lambda t: t.float()),
    "short nested absmax": put("nested_absmax", lambda t: t[:-1]),
    "long nested absmax": put("nested_absmax", lambda t: t.repeat(2)),
    "scale not finite": put("nested_absmax", with_inf),
    "offset not finite": edit(nested_offset=math.nan),
    "another nested blocksize": edit(nested_blocksize=128),
    "another shape": edit(shape=[64, 64]),
    "negative shape": edit(shape=[-64, -320]),
    "blocksize 0": edit(blocksize=0),
    "blocksize 48": edit(blocksize=48),
    "unknown quant_type": edit(quant_type="nf5"),
    "dtype not a dtype": edit(dtype="nn"),
    "dtype of integers": edit(dtype="int64"),
    "not JSON": put("quant_state.bitsandbytes__nf4", lambda t: t[1:]),
    "a list": put("quant_state.bitsandbytes__nf4", lambda _: torch.tensor([91, 93], dtype=torch.uint8)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(damage: str) -> None:
    """A file of others with anything wrong in it says so, by the weight's name; nothing is read past its end."""
    codes, tensors = stored()
    assert QuantizedWeight.from_bnb_tensors(codes, dict(tensors)).shape == (64, 320)
    DAMAGE[damage](tensors)
    with pytest.raises(ModelError, match=r"^model\.q: "):
        QuantizedWeight.from_bnb_tensors(codes, tensors, name="model.q")


def test_scales_that_are_not_finite_are_refused_without_double_quantization() -> None:
    codes, tensors = stored(double_quant=False)
    tensors["absmax"] = with_inf(tensors["absmax"])
    with pytest.raises(ModelError, match="w: "):
        QuantizedWeight.from_bnb_tensors(codes, tensors, name="w")
    with pytest.raises(ModelError, match="w: does not hold what its quant_state says"):
        QuantizedWeight.from_bnb_tensors(codes[:-1], stored(double_quant=False)[1], name="w")
