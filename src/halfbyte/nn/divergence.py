"""How far a model's predictions are from another's, without ever holding all logits of either."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.nn.cross_entropy import CHUNK_BYTES, IGNORE_INDEX, chunked


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
    goals = wanted[targets[kept]].to(hidden.dtype)

    @torch.no_grad()
    def score(logits: Tensor, some: slice, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        goal = head(goals[some]).float().log_softmax(1)
        own, share = logits.float().log_softmax(1), goal.exp()
        loss = goal.sub_(own).mul_(share).sum()
        return loss, own.exp_().sub_(share) if needs_grad else None

    return chunked(rows, head, score, chunk)
