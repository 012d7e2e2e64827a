"""Rows of embedding and head that are trained: the same losses and gradients as plain autograd over whole tables."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte.nn.cross_entropy as cross_entropy
from halfbyte.nn import IGNORE_INDEX, FrozenLinear, chunked_cross_entropy
from halfbyte.nn.int8_embedding import Int8Embedding
from halfbyte.nn.trained_rows import TrainedEmbedding, TrainedHead
from halfbyte.quant.int8 import dequantize_int8, quantize_int8

VOCAB, HIDDEN, IDS = 101, 32, [97, 3, 100, 40]


def table(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def rows_of(whole: bool, dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, Tensor | None]:
    ids = None if whole else torch.tensor(IDS)
    values = torch.randn(VOCAB if whole else len(IDS), HIDDEN, generator=torch.Generator().manual_seed(2))
    return nn.Parameter(values.to(dtype)), ids


def merged(base: Tensor, rows: Tensor, ids: Tensor | None) -> Tensor:
    return rows if ids is None else base.to(rows.dtype).index_copy(0, ids, rows)


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 90, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, 90), generator=generator)
    labels[torch.rand(2, 90, generator=generator) > 0.6] = IGNORE_INDEX
    labels[0, 5:9] = torch.tensor(IDS)
    return hidden, labels


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("chunk", [16, 17, 10_000])
def test_head(whole: bool, dtype: torch.dtype, close: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients against autograd in the same dtype, as parts of the largest; measured: float64 8e-16, float32 5e-7,
    bfloat16 2e-2, whose reference is computed in float32."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk * VOCAB * 4)
    wide = torch.promote_types(dtype, torch.float32)
    rows, ids = rows_of(whole, wide)
    base = table(wide)
    head = TrainedHead(FrozenLinear(nn.Parameter(base, requires_grad=False)), rows, ids)
    hidden, labels = batch(dtype)
    found, _ = chunked_cross_entropy(hidden, labels, head, VOCAB)
    logits = F.linear(hidden.to(wide), merged(base, rows, ids))[:, :-1]
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-2 if dtype.itemsize == 2 else 1e-6)
    mine = torch.autograd.grad(found, (hidden, rows))
    wanted = torch.autograd.grad(expected, (hidden, rows))
    for own, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(own.to(wide), other.to(wide), rtol=0, atol=close * float(other.abs().max()))


@pytest.mark.parametrize("whole", [False, True])
def test_all_logits(whole: bool) -> None:
    """Where an architecture changes logits after its head, they are held whole, and differentiable."""
    rows, ids = rows_of(whole)
    head = TrainedHead(nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.float64).requires_grad_(False), rows, ids)
    hidden, _ = batch(torch.float64)
    base = head.base_layer.weight
    (mine,) = torch.autograd.grad(head(hidden).tanh().sum(), rows)
    (wanted,) = torch.autograd.grad(F.linear(hidden, merged(base, rows, ids)).tanh().sum(), rows)
    torch.testing.assert_close(mine, wanted)
    with torch.no_grad():
        torch.testing.assert_close(head.logits(hidden[0]), head(hidden[0]))
    head.enable_adapters(False)
    torch.testing.assert_close(head(hidden), head.base_layer(hidden))


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["plain", "scaled", "int8", "scaled int8"])
def test_embedding(whole: bool, kind: str) -> None:
    base = table(torch.float32)
    plain = (Scaled if "scaled" in kind else nn.Embedding)(VOCAB, HIDDEN, padding_idx=0, _weight=base.clone())
    layer: nn.Module = plain.requires_grad_(False)
    if "int8" in kind:
        codes, scales = quantize_int8(base)
        base = dequantize_int8(codes, scales, torch.float32)
        weight = nn.Parameter(codes, requires_grad=False)
        layer = Int8Embedding(weight, scales, plain, torch.float32, torch.float32)
    rows, ids = rows_of(whole, torch.float32)
    embedding = TrainedEmbedding(layer, rows, ids)
    given = torch.tensor([[0, 3, 5, 97], [100, 3, 41, 2]])
    expected = F.embedding(given, merged(base, rows, ids)) * (3 if "scaled" in kind else 1)
    found = embedding(given)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    weights = torch.randn(found.shape)
    (mine,) = torch.autograd.grad((found * weights).sum(), rows)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), rows)
    torch.testing.assert_close(mine, wanted)
    if not whole:  # none of its tokens: no gradient, but not none
        (none,) = torch.autograd.grad(embedding(torch.tensor([[5, 6]])).sum(), rows)
        assert not none.any()
    embedding.enable_adapters(False)
    torch.testing.assert_close(embedding(given), layer(given))
