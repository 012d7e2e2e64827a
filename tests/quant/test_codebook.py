"""The codebooks that bitsandbytes does not have: their tables, their error, their files."""

from __future__ import annotations

import json

import pytest
import torch
from quant.derive_codebooks import af4, bof4

import halfbyte as hb
from halfbyte.config.base import BLOCKSIZES
from halfbyte.config.formats import BNB_TYPES, QUANT_TYPES, constants_of, state_key
from halfbyte.errors import ConfigError, ModelError
from halfbyte.quant import QuantizedWeight
from halfbyte.quant.blocks import num_code_bytes
from halfbyte.quant.codebook import codebook
from halfbyte.quant.nibbles import pack_codes, unpack_codes

OURS = [name for name in QUANT_TYPES if name not in BNB_TYPES]


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_tables_are_those_of_their_definitions(blocksize: int) -> None:
    """8 digits; AF4 for blocks of 64 as its author prints it, BOF4 as its authors have it from samples (1.3e-4)."""
    derived = {"af4": af4(blocksize), "bof4": bof4(blocksize), "bof4-s": bof4(blocksize, signed=True)}
    for name, values in derived.items():
        torch.testing.assert_close(codebook(name, blocksize).values, values.float(), rtol=1e-6, atol=1e-8)
    if blocksize == 64:
        published = torch.tensor([-0.69441008, -0.04934812, 0.04273164, 0.72424863])
        torch.testing.assert_close(derived["af4"][[1, 6, 8, 14]].float(), published, rtol=0, atol=2e-8)
        published = torch.tensor([-0.7535245, -0.1015388, 0.0887245, 0.7790452])
        torch.testing.assert_close(derived["bof4"][[1, 6, 8, 14]].float(), published, rtol=0, atol=1.3e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_lie_one_after_the_other(bits: int) -> None:
    """As a number in base 2**bits, the first code its highest digit; ragged ends hold the code of padding."""
    for count in (1, 7, 8, 9, 64, 101):
        codes = torch.randint(2**bits, (count,), dtype=torch.uint8)
        packed = pack_codes(codes, bits, pad_code=1)
        assert packed.numel() == num_code_bytes(count, bits)
        assert torch.equal(unpack_codes(packed, bits, count), codes)
    assert pack_codes(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3, 0).tolist() == [0x29, 0xCB, 0xB8]
    assert pack_codes(torch.tensor([1, 2, 3], dtype=torch.uint8), 2, 1).tolist() == [0b01101101]


def test_int8_by_hand(backend: str) -> None:
    weight = hb.quantize(torch.tensor([0.1, 2.5, -1.5]), quant_type="int8", double_quant=False)
    assert weight.codes.view(torch.int8).tolist() == [5, 127, -76]
    assert weight.absmax.tolist() == pytest.approx([2.5 / 127])


def test_int4_by_hand(backend: str) -> None:
    weight = hb.quantize(torch.tensor([0.1, 2.5, -1.5]), quant_type="int4", double_quant=False, scale="absmax")
    assert weight.codes.tolist() == [(0 + 8) << 4 | (7 + 8), (-4 + 8) << 4 | 8]
    assert weight.absmax.tolist() == pytest.approx([2.5 / 7])
    assert weight.dequantize().tolist() == pytest.approx([0.0, 2.5, -4 * 2.5 / 7])


ERRORS = {
    "nf4": 8.45e-3,
    "fp4": 1.49e-2,
    "int4": 1.16e-2,
    "int4-asym": 8.03e-3,
    "af4": 9.16e-3,
    "bof4": 8.02e-3,
    "bof4-s": 7.36e-3,
    "int8": 3.5e-5,
    "nf3": 4.06e-2,
    "nf2": 3.17e-1,
}


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_error_of_normal_weights(backend: str, quant_type: str) -> None:
    """Measured on 2e6 of them, blocks of 64; double quantization adds 0.1 %, of BOF4-S's scales 0.6, of INT8 12."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))

    def error(**how: object) -> float:
        wrong = hb.quantize(weight, quant_type=quant_type, **how).dequantize() - weight  # type: ignore[arg-type]
        return float(wrong.square().sum() / weight.square().sum())

    assert error(double_quant=False, scale="absmax") == pytest.approx(ERRORS[quant_type], rel=0.01)
    assert error(scale="absmax") < (1.13 if quant_type == "int8" else 1.01) * ERRORS[quant_type]
    assert error(scale="mse-signed") < (1.04 if quant_type == "int8" else 0.95) * ERRORS[quant_type]


@pytest.mark.parametrize("quant_type", OURS)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (129, 127), (2, 3, 67)])
def test_odd_sizes_and_zeros(backend: str, quant_type: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight.view(-1)[64:160] = 0.0
    most = 0.55 if quant_type == "nf2" else 0.35
    for blocksize in BLOCKSIZES[::3]:
        made = hb.quantize(weight, quant_type=quant_type, blocksize=blocksize, scale="absmax")
        assert ((made.dequantize() - weight).abs() <= most * weight.abs().max()).all() if weight.numel() else True
        if constants_of(quant_type) == 1 or blocksize == 32:
            assert not made.dequantize().view(-1)[64:160].any()


@pytest.mark.parametrize("double_quant", [True, False])
def test_zeros_beside_others_are_within_half_a_step_of_an_offset(backend: str, double_quant: bool) -> None:
    """Measured: 0.290 of a step in square mean, where evenly spread numbers have 0.289; blocks of zeros stay zeros."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    weight.view(-1)[::10] = 0.0
    weight[:, 128:256] = 0.0
    made = hb.quantize(weight, quant_type="int4-asym", double_quant=double_quant, scale="absmax")
    steps = made.scales_and_offsets()[0].repeat_interleave(64).view(weight.shape)
    assert not made.dequantize()[:, 128:256].any()
    off = (made.dequantize() / steps)[weight == 0].abs()
    off = off[off > 0]
    assert off.max() < (0.53 if double_quant else 0.5001)
    assert off.square().mean().sqrt() == pytest.approx(0.29, abs=0.005)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", OURS)
def test_files_say_which_it_is_and_bitsandbytes_does_not_see_one(quant_type: str, double_quant: bool) -> None:
    weight = hb.quantize(torch.randn(33, 77).bfloat16(), quant_type=quant_type, double_quant=double_quant)
    tensors = weight.bnb_tensors()
    assert not any("bitsandbytes" in key for key in tensors)
    back = QuantizedWeight.from_bnb_tensors(weight.codes, tensors)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert (back.quant_type, back.blocksize, back.shape, back.dtype) == (quant_type, 64, (33, 77), torch.bfloat16)
    with pytest.raises(ConfigError, match=rf"to_bnb: bitsandbytes has no {quant_type}. Quantize to nf4 or fp4"):
        weight.to_bnb()
    functional = pytest.importorskip("bitsandbytes.functional")
    with pytest.raises(ValueError, match="quant_state"):
        functional.QuantState.from_dict({f"weight.{key}": value for key, value in tensors.items()}, device="cpu")


@pytest.mark.parametrize(("key", "says"), [("nf4", "int4"), ("int4", "nf4"), ("af4", "bof4"), ("nf4", "int5")])
def test_a_file_that_contradicts_itself_is_refused(key: str, says: str) -> None:
    tensors = hb.quantize(torch.randn(8, 64), quant_type=key).bnb_tensors()
    numbers = json.loads(bytes(tensors.pop(state_key(key)).tolist())) | {"quant_type": says}
    tensors[state_key(key)] = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)
    with pytest.raises(ModelError, match=rf"{state_key(key)} says {says}|unknown quant_type 'int5'"):
        QuantizedWeight.from_bnb_tensors(torch.zeros(256, dtype=torch.uint8), tensors)


def test_a_table_of_another_block_size_is_refused() -> None:
    tensors = hb.quantize(torch.randn(8, 64), quant_type="bof4").bnb_tensors()
    tensors["quant_map"] = codebook("bof4", 128).values.clone()
    with pytest.raises(ModelError, match="its quant_map is not the table of bof4"):
        QuantizedWeight.from_bnb_tensors(torch.zeros(256, dtype=torch.uint8), tensors)
