"""chunked_cross_entropy equals cross-entropy over all logits: loss and gradient, whatever the chunks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte.nn.cross_entropy as module
from halfbyte.nn import IGNORE_INDEX, chunked_cross_entropy

VOCAB, HIDDEN = 101, 32

Head = Callable[[Tensor], Tensor]


def full(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    logits = head(hidden)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def batch(dtype: torch.dtype = torch.float32, supervised: float = 0.6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 90, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, 90), generator=generator)
    labels[torch.rand(2, 90, generator=generator) > supervised] = IGNORE_INDEX
    return hidden, labels


def heads() -> dict[str, Head]:
    torch.manual_seed(1)
    linear = nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)
    with torch.no_grad():
        linear.weight.mul_(20)  # logits of about 10, so that capping them matters
    return {"linear": linear, "softcapped": lambda x: 5 * torch.tanh(linear(x) / 5)}


@pytest.mark.parametrize("head", ["linear", "softcapped"])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 10_000])
def test_equals_full(head: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * VOCAB * 4)
    hidden, labels = batch()
    expected = full(hidden, labels, heads()[head])
    found, count = chunked_cross_entropy(hidden, labels, heads()[head], VOCAB)
    assert count == int((labels[:, 1:] != IGNORE_INDEX).sum())
    # fp32 rounding; measured over these cases: 1.8e-7 of the loss, 1.0e-6 of the largest gradient.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    (expected_grad,) = torch.autograd.grad(expected / count, hidden)
    (grad,) = torch.autograd.grad(found / count, hidden)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=4e-6 * float(expected_grad.abs().max()))


def test_chunks_change_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent, so only the order in which chunks are summed may show."""
    hidden, labels = batch()
    head = heads()["linear"]
    losses = []
    for rows in (16, 23, 10_000):
        monkeypatch.setattr(module, "CHUNK_BYTES", rows * VOCAB * 4)
        losses.append(chunked_cross_entropy(hidden, labels, head, VOCAB)[0].item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_sixteen_bits() -> None:
    """bf16 hidden states and head: the loss is summed in fp32 over logits rounded to bf16, as transformers does."""
    hidden, labels = batch(torch.bfloat16)
    head = heads()["linear"].bfloat16()
    expected = full(hidden, labels, head)
    found, count = chunked_cross_entropy(hidden, labels, head, VOCAB)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    (expected_grad,) = torch.autograd.grad(expected / count, hidden)
    (grad,) = torch.autograd.grad(found / count, hidden)
    # The gradient is rounded to bf16 before it is divided here, after it there: 3 roundings of 2^-8, on sums of 101.
    scale = float(expected_grad.abs().max())
    torch.testing.assert_close(grad.float(), expected_grad.float(), rtol=0, atol=4 * 2**-8 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_targets(dtype: torch.dtype) -> None:
    hidden, labels = batch(dtype)
    labels[:, 1:] = IGNORE_INDEX  # a label at the first token has nothing before it to be predicted from
    loss, count = chunked_cross_entropy(hidden, labels, heads()["linear"], VOCAB)
    assert (loss.item(), count, loss.dtype) == (0.0, 0, torch.float32)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert not grad.any()


def test_logits_are_never_whole_and_unsupervised_rows_never_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 20 * VOCAB * 4)
    hidden, labels = batch(supervised=0.3)
    linear, seen = heads()["linear"], []

    def head(rows: Tensor) -> Tensor:
        seen.append(rows.shape[0])
        return linear(rows)

    _, count = chunked_cross_entropy(hidden, labels, head, VOCAB)
    assert max(seen) == 20
    assert sum(seen) == count < labels.numel() // 2


def test_evaluation_keeps_nothing() -> None:
    hidden, labels = batch()
    with torch.no_grad():
        loss, _ = chunked_cross_entropy(hidden.detach(), labels, heads()["linear"], VOCAB)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, full(hidden, labels, heads()["linear"]).detach(), rtol=1e-6, atol=0)


def test_extreme_logits_stay_finite() -> None:
    hidden, labels = batch()
    loss, count = chunked_cross_entropy(hidden * 1e4, labels, heads()["linear"], VOCAB)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss / count, hidden)[0]).all()
