"""int8 with scales: half a step of rounding, blocks and rows that stand by themselves."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quant.int8 import check_int8, dequantize_int8, quantize_int8

SHAPES = [(1, 1), (3, 63), (3, 64), (2, 65), (5, 200), (0, 64), (4, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_half_a_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scales = quantize_int8(weight)
    check_int8(codes, scales)
    decoded = dequantize_int8(codes, scales, torch.float32)
    for block, columns in enumerate(weight.float().split(64, dim=1) if weight.shape[1] else ()):
        step = columns.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(scales[:, block : block + 1], step, rtol=1e-6, atol=0)
        error = (decoded[:, 64 * block : 64 * (block + 1)] - columns).abs()
        assert (error <= step * (0.5 + 1e-4)).all()
    assert torch.equal(dequantize_int8(codes, scales, dtype), decoded.to(dtype))


def test_rows_stand_by_themselves() -> None:
    weight = torch.randn(50, 130)
    codes, scales = quantize_int8(weight)
    ids = torch.tensor([[7, 7, 0], [49, 3, 1]])
    assert all(torch.equal(a, b) for a, b in zip(quantize_int8(weight[3:9]), (codes[3:9], scales[3:9]), strict=True))
    looked_up = dequantize_int8(codes[ids], scales[ids], torch.bfloat16)
    assert torch.equal(looked_up, dequantize_int8(codes, scales, torch.bfloat16)[ids])


def test_what_has_255_steps_comes_back_exactly() -> None:
    """Zeros and the smallest numbers, too."""
    steps = torch.randint(-126, 127, (6, 128)).float()
    steps[:, ::64] = 127
    weight = steps * torch.tensor([1.0, 2.0**-20, 2.0**20, 0.0, 3.0, 1e-44])[:, None]
    codes, scales = quantize_int8(weight)
    decoded = dequantize_int8(codes, scales, torch.float32)
    torch.testing.assert_close(decoded[:5], weight[:5], rtol=1e-6, atol=0)
    assert not decoded[3].any()
    assert decoded[5].abs().max() < 1e-38


@pytest.mark.parametrize(
    ("codes", "scales", "said"),
    [
        (torch.zeros(3, 65).byte(), torch.ones(3, 2), "not for torch.uint8"),
        (torch.zeros(3, 65).char(), torch.ones(3, 1), r"of \(3, 2\)"),
        (torch.zeros(3, 65).char(), torch.ones(3, 2).half(), "float32 scales"),
    ],
)
def test_refusals(codes: torch.Tensor, scales: torch.Tensor, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        check_int8(codes, scales)
