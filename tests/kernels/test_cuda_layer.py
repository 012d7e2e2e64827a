"""What a GPU computes for a decoder layer, on the CPU: the functions registered for CUDA get CPU tensors.

The Triton kernels behind some of them: triton_cases.py. All of it on a GPU: test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import attention, cuda_attention, cuda_layer, cuda_lora, norm
from halfbyte.kernels.lora_linear import _members, _plain_backward, _plain_forward
from halfbyte.kernels.registry import CUDA_VARIABLE, cuda_choice
from halfbyte.quant import quantize


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(CUDA_VARIABLE, "reference")
    cuda_choice.cache_clear()
    yield
    cuda_choice.cache_clear()


def close(found: Tensor, expected: Tensor, bound: float) -> None:
    """Within `bound` of the largest element."""
    assert found.dtype == expected.dtype
    assert (found.double() - expected.double()).abs().max() <= bound * expected.double().abs().max()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [2, 300])
def test_adapted_layers(rows: int, dtype: torch.dtype, bound: float) -> None:
    """Beside the specification, few rows and many; measured 6e-7 in float32 and 6e-3 in bfloat16 at most."""
    torch.manual_seed(0)
    weights = [quantize(torch.randn(out, 64)) for out in (96, 32, 48)]
    group = (
        [w.codes for w in weights], [w.absmax for w in weights], [w.nested_absmax for w in weights],
        [w.nested_offset for w in weights], "nf4", 64, [96, 32, 48], [torch.randn(96), None, torch.randn(48)],
        [torch.randn(8, 64), None, torch.randn(4, 64)], [torch.randn(96, 8), None, torch.randn(48, 4)],
        [2.0, 1.0, 0.5],
    )  # fmt: skip
    x, g = torch.randn(rows, 64).to(dtype), torch.randn(rows, 176).to(dtype)
    members = _members(group, 64)
    y, u = cuda_lora.lora_linear_4bit(x, *group)
    expected_y, expected_u = _plain_forward(x, members)
    close(y, expected_y, bound)
    close(u, expected_u, bound)
    dx, dA, dB = cuda_lora.lora_linear_4bit_backward(g, x, u, *group, True)
    expected_dx, expected_dA, expected_dB = _plain_backward(g, x, expected_u, members, True)
    close(dx, expected_dx, bound)
    for found, expected in zip([*dA, *dB], [*expected_dA, *expected_dB], strict=True):
        close(found, expected, bound)
    assert cuda_lora.lora_linear_4bit_backward(g, x, u, *group, False)[0].shape == (0, 64)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, longest: int, most_keys: int, *_: object,
    scale: float, window_size_left: int | None, window_size_right: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """torch's operator by plain attention of each sequence on its keys: what is handed to it must be right."""
    assert longest == int(starts.diff().max())
    assert most_keys == int(key_starts.diff().max())
    assert window_size_right == (None if window_size_left is None else 0)
    outs, sums = [], []
    for a, b, c, d in zip(
        *(t.tolist() for t in (starts[:-1], starts[1:], key_starts[:-1], key_starts[1:])), strict=True
    ):
        qs, ks, vs = (t.transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d]))
        ks, vs = (t.repeat_interleave(q.shape[1] // k.shape[1], 0) for t in (ks, vs))
        window = 0 if window_size_left is None else window_size_left + 1
        scores = attention._scores(qs, ks, scale, window)
        outs.append((scores.softmax(-1) @ vs).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1), torch.empty(0), torch.empty(0), torch.empty(0)


def flash_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, **more: Any
) -> Any:
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        again, *_ = flash_forward(*leaves, *rest[:4], **more)
    assert torch.allclose(again, out, atol=1e-5)
    assert torch.are_deterministic_algorithms_enabled()
    return torch.autograd.grad(again, leaves, g)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("parents", [None, [-1, 0, 0, 2]])
def test_attention(parents: list[int] | None, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sequences, their keys and their gradients lie; torch's kernel itself runs on GPUs only."""
    torch.manual_seed(0)
    monkeypatch.setattr(cuda_attention, "flash_serves", lambda *_: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward, raising=False)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward, raising=False)
    qkv, starts = torch.randn(19, (4 + 2 * 2) * 8), torch.tensor([0, 6, 7, 15, 19], dtype=torch.int32)
    case = (4, 2, starts, 0.3, window, None if parents is None else torch.tensor(parents, dtype=torch.int32))
    out, lse = cuda_attention.packed_attention(qkv, *case)
    expected, expected_lse = attention.plain_packed_attention(qkv, *case)
    close(out, expected, 1e-5)
    close(lse, expected_lse, 1e-5)
    g = torch.randn_like(out)
    dqkv = cuda_attention.packed_attention_backward(g, qkv, out, lse, *case)
    close(dqkv, attention.plain_packed_attention_backward(g, qkv, out, lse, *case), 1e-5)
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_triton_the_specification_serves() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 16), torch.randn(16)
    assert torch.equal(cuda_layer.rms_norm(x, weight, 1e-5, 0.0)[0], norm.plain_rms_norm(x, weight, 1e-5, 0.0)[0])
    logits = torch.randn(3, 16)
    assert cuda_layer.softmax_cross_entropy_(logits, torch.tensor([1, 2, 3])).dtype == torch.float32
