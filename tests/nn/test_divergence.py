"""chunked_divergence equals KL over all logits: value and gradient, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfbyte.nn.divergence as module
from halfbyte.nn import IGNORE_INDEX, chunked_divergence

VOCAB, HIDDEN = 101, 32


@pytest.mark.parametrize("rows", [16, 17, 10_000])
def test_equals_full(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * VOCAB * 16)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB).requires_grad_(False)
    head.weight.mul_(10)
    hidden = torch.randn(2, 45, HIDDEN, requires_grad=True)
    labels = torch.full((2, 45), IGNORE_INDEX)
    chosen = torch.rand(2, 45) < 0.6
    chosen[:, 0] = False  # no token predicts the first
    count = int(chosen.sum())
    labels[chosen] = torch.randperm(count)
    wanted = torch.randn(count, HIDDEN)

    own = head(hidden[:, :-1][chosen[:, 1:]]).log_softmax(1)
    goal = head(wanted[labels[chosen]]).log_softmax(1)
    expected = F.kl_div(own, goal, reduction="sum", log_target=True)
    found = chunked_divergence(hidden, labels, wanted, head, VOCAB)
    # fp32 rounding; measured: 1e-7 of the sum, 3e-7 of the largest gradient.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    (grad,) = torch.autograd.grad(found, hidden)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=3e-6 * float(expected_grad.abs().max()))


def test_no_labels() -> None:
    hidden = torch.randn(1, 4, HIDDEN, requires_grad=True)
    head = nn.Linear(HIDDEN, VOCAB).requires_grad_(False)
    found = chunked_divergence(hidden, torch.full((1, 4), IGNORE_INDEX), torch.empty(0, HIDDEN), head, VOCAB)
    found.backward()
    assert float(found.detach()) == 0
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) == 0
