"""Parity with bitsandbytes over random shapes, block sizes, dtypes and codebooks, double-quantized or not.

Decoding is equal to the bit in both directions. Codes: bitsandbytes' CPU path multiplies full blocks by a reciprocal
and divides a short last one, and so do we, so no code may differ here (0 of 8.9 million bytes over the 1,000 shapes);
the promise is >= 99.99 %, because a CUDA build's reciprocal is approximate.

Its own helpers need two precautions (bitsandbytes 0.50):
- the AVX-512 dequantize is wrong where a row is no multiple of the block size; blocks run over the flat tensor in any
  case, so its QuantState is given the shape [1, n], where it is right;
- it compiles parts of itself; `set_stance("force_eager")` keeps a compiler out of the comparison.
"""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from halfbyte.quant import QuantizedWeight, quantize
from halfbyte.quant.codebook import codebook, dynamic_map

functional = pytest.importorskip("bitsandbytes.functional", reason="needs the package bitsandbytes")

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_weight(generator: torch.Generator) -> Tensor:
    """1 to 3 dimensions, up to some 60,000 elements; a third of them with zero runs, a third with ties."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    dims = pick(1, 4)
    shape = [pick(1, (60_000, 250, 40)[dims - 1]) for _ in range(dims)]
    weight = torch.randn(shape, generator=generator) * 10.0 ** pick(-4, 3)
    kind = pick(0, 3)
    if kind == 1:
        flat = weight.view(-1)
        flat[: flat.numel() // 2] = 0.0
    elif kind == 2:
        weight = torch.randint(-16, 17, shape, generator=generator) / 16
    return weight.to(DTYPES[pick(0, 3)])


def their_dequantize(packed: Tensor, state: object, shape: tuple[int, ...]) -> Tensor:
    state.shape = torch.Size([1, prod(shape)])  # type: ignore[attr-defined]  # see the module's docstring
    try:
        return functional.dequantize_4bit(packed, state).view(shape)
    finally:
        state.shape = torch.Size(shape)  # type: ignore[attr-defined]


def compare(trial: int) -> tuple[int, int]:
    """(code bytes, bytes that differ) of one random weight; asserts everything that is exact."""
    generator = torch.Generator().manual_seed(trial)
    weight = random_weight(generator)
    shape, (quant_type, double_quant) = tuple(weight.shape), (("nf4", "fp4")[trial % 2], trial % 4 < 2)
    blocksize = BLOCKSIZES[trial % len(BLOCKSIZES)]
    ours = quantize(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant, scale="absmax")
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant
    )
    what = (trial, shape, weight.dtype, quant_type, blocksize, double_quant)
    theirs = QuantizedWeight.from_bnb(packed, state)
    assert theirs.shape == shape, what
    assert torch.equal(theirs.dequantize(), their_dequantize(packed, state, shape)), what
    assert torch.equal(ours.dequantize(), their_dequantize(*ours.to_bnb(), shape)), what
    if not double_quant:  # an all-zero short last block: 1e-38 in theirs, which decodes to zeros of no use; 0 in ours
        assert torch.equal(ours.absmax, torch.where(state.absmax == 1e-38, 0.0, state.absmax)), what
    return packed.numel(), int((ours.codes != packed.reshape(-1)).sum())


def run(trials: range) -> None:
    with torch.compiler.set_stance("force_eager"):
        counts = [compare(trial) for trial in trials]
    total, different = (sum(column) for column in zip(*counts, strict=True))
    assert total > 2_500 * len(trials)  # the comparison is not about next to nothing
    assert different <= total * 1e-4, f"{different} of {total} code bytes differ"


def test_hundred_shapes() -> None:
    run(range(100))


@pytest.mark.slow
def test_thousand_shapes() -> None:
    run(range(1000))


def test_tables_are_theirs() -> None:
    assert torch.equal(dynamic_map(), functional.create_dynamic_map(signed=True))
    for quant_type in ("nf4", "fp4"):
        assert torch.equal(codebook(quant_type, 64).values, functional.get_4bit_type(quant_type, device="cpu"))
    published = (
        -0.8480964, -0.6106329, -0.4599953, -0.3396794, -0.2346074, -0.1379117, -0.0455250, 0.0397901, 0.1202553,
        0.2035213, 0.2920138, 0.3893125, 0.5016634, 0.6427869, 0.8614784,
    )  # fmt: skip  # bitsandbytes' kernels.cu, printed to 7 digits
    torch.testing.assert_close(codebook("nf4", 64).boundaries, torch.tensor(published), rtol=0, atol=6e-8)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_round_trip(quant_type: str, double_quant: bool) -> None:
    """to_bnb then from_bnb gives every field back, and shares the codes' memory."""
    weight = quantize(torch.randn(33, 77).bfloat16(), quant_type=quant_type, double_quant=double_quant)
    packed, state = weight.to_bnb()
    assert packed.shape == (weight.codes.numel(), 1)
    assert packed.data_ptr() == weight.codes.data_ptr()
    assert state.nested is double_quant
    back = QuantizedWeight.from_bnb(packed, state)
    assert back.op_args[3:] == weight.op_args[3:]
    assert (back.shape, back.dtype) == (weight.shape, weight.dtype)
    for ours, again in zip(weight.op_args[:3], back.op_args[:3], strict=True):
        assert (ours is None) is (again is None)
        assert ours is None or torch.equal(ours, again)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_quant_storage(storage: torch.dtype) -> None:
    """FSDP users store the same bytes under another dtype."""
    weight = torch.randn(64, 96)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    found = QuantizedWeight.from_bnb(packed, state)
    assert torch.equal(found.codes, quantize(weight, double_quant=False, scale="absmax").codes)
