"""Attention over packed sequences equals attention over each by itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.nn.packed_attention import (
    NAME,
    enable_packed_attention,
    packed_attention,
    supports_packed_attention,
)

STARTS = [0, 1, 8, 30, 32]
HEADS = 4
DIMS = pytest.mark.parametrize("dim", [16, 12])
"""One that the packed operator's kernels know, and one that goes to torch's attention."""


def qkv(kv_heads: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, STARTS[-1], dim, generator=generator).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def by_hand(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Softmax attention of one sequence in fp64, written out."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(HEADS // tensor.shape[1], dim=1) for tensor in (key, value))
    i, j = (torch.arange(query.shape[2]).view(shape) for shape in ((-1, 1), (1, -1)))
    visible = (j <= i) & (j > i - (window or math.inf))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@DIMS
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 5, 22, 100])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_equals_each_sequence_alone(dim: int, kv_heads: int, window: int | None, scaling: float | None) -> None:
    tensors = qkv(kv_heads, dim)
    found, weights = packed_attention(
        nn.Module(), *tensors, None, seq_starts=STARTS, scaling=scaling, sliding_window=window
    )
    expected = torch.cat(
        [
            by_hand(*(tensor[:, :, start:stop] for tensor in tensors), scaling or dim**-0.5, window)
            for start, stop in itertools.pairwise(STARTS)
        ],
        dim=1,
    )
    assert weights is None
    assert found.shape == (1, STARTS[-1], HEADS, dim)
    # fp32 against fp64; measured 7e-7 forward at values of about 1, 8e-6 backward at gradients of up to 7.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    upstream = torch.randn_like(expected)
    for ours, exact in zip(
        torch.autograd.grad(found, tensors, upstream.float()), torch.autograd.grad(expected, tensors, upstream),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, exact, rtol=0, atol=2e-5)


@DIMS
def test_nothing_crosses_a_boundary(dim: int) -> None:
    """What a sequence gives does not move by a bit when its neighbours change."""
    tensors = [tensor.detach() for tensor in qkv(2, dim)]
    before, _ = packed_attention(nn.Module(), *tensors, None, seq_starts=STARTS)
    for tensor in tensors:
        tensor[:, :, :8] = torch.randn_like(tensor[:, :, :8])
        tensor[:, :, 30:] = torch.nan
    after, _ = packed_attention(nn.Module(), *tensors, None, seq_starts=STARTS)
    assert torch.equal(before[:, 8:30], after[:, 8:30])


def tiny(**kwargs: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **kwargs,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_model_inside_and_outside_the_block() -> None:
    model = tiny()
    own = model.config._attn_implementation
    ids = torch.randint(0, 64, (1, 32))
    positions = torch.cat([torch.arange(n) for n in torch.tensor(STARTS).diff().tolist()])[None]
    with torch.no_grad():
        alone = torch.cat([model(ids[:, a:b]).logits for a, b in itertools.pairwise(STARTS)], dim=1)
        with enable_packed_attention(model):
            assert model.config._attn_implementation == NAME
            packed = model(ids, position_ids=positions, seq_starts=STARTS, use_cache=False).logits
        assert model.config._attn_implementation == own
        # fp32 rounding through two layers; measured 6e-8 at logits of about 0.1
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-6)
        assert torch.isfinite(model(ids).logits).all()


def test_own_attention_comes_back_after_an_error() -> None:
    model = tiny()
    own = model.config._attn_implementation
    with pytest.raises(KeyError), enable_packed_attention(model):
        raise KeyError
    assert model.config._attn_implementation == own


def test_special_terms_are_seen() -> None:
    model = tiny()
    assert supports_packed_attention(model)
    model.config.attn_logit_softcapping = 50.0
    assert not supports_packed_attention(model)
