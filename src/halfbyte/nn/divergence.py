"""How far a model's predictions are from another's, without ever holding all logits of either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.nn.cross_entropy import CHUNK_BYTES, IGNORE_INDEX


class _ChunkedDivergence(torch.autograd.Function):
    """KL divergence and its gradient in one pass over chunks of rows; neither head nor `wanted` gets a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, head: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        needs_grad = hidden.requires_grad
        grad = torch.empty_like(hidden) if needs_grad else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            chunk = hidden[start : start + rows].detach().requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                logits = head(chunk)
            goal = head(wanted[start : start + rows].to(hidden.dtype)).float().log_softmax(1)
            own, share = logits.detach().float().log_softmax(1), goal.exp()
            total += goal.sub_(own).mul_(share).sum()
            if grad is not None:
                pull = own.exp_().sub_(share).to(logits.dtype)
                (grad[start : start + rows],) = torch.autograd.grad(logits, chunk, pull)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None


def chunked_divergence(
    hidden: Tensor, labels: Tensor, wanted: Tensor, head: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """Summed KL(what `head` predicts from `wanted` || what it predicts from `hidden`), a float32 scalar.

    Args:
        hidden: (batch, tokens, hidden_size), what the head takes; the result is differentiable in it.
        labels: (batch, tokens) int64: label t + 1 is the row of `wanted` for token t, or IGNORE_INDEX.
        wanted: (rows, hidden_size), of any float dtype.
        head: rows (n, hidden_size) -> logits (n, vocab_size); frozen.
    """
    targets = labels[:, 1:].reshape(-1)
    kept = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])[kept]
    chunk = max(CHUNK_BYTES // (16 * vocab_size), 16)  # four float32 buffers of a chunk's logits are alive at a time
    total: Tensor = _ChunkedDivergence.apply(rows, wanted[targets[kept]], head, chunk)  # type: ignore[no-untyped-call]
    return total
