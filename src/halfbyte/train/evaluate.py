"""Held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from halfbyte.data import TokenizedData, eval_batches
from halfbyte.train.objective import Objective
from halfbyte.train.ranks import ALONE, Ranks


@dataclass(frozen=True)
class EvalResult:
    """Loss per supervised token over `supervised_tokens` tokens."""

    loss: float
    supervised_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    data: TokenizedData,
    *,
    max_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> EvalResult:
    """Loss of `model` on all of `data`, in batches of at most `max_tokens` tokens; no dropout, no gradient.

    Args:
        ranks: each takes every world-th batch; the loss is of all.
    """
    was_training = model.training
    model.eval()
    total, targets, done = 0.0, 0, 0
    batches = eval_batches(data, max_tokens)
    while together := list(islice(batches, ranks.world)):
        counts = ranks.rank < len(together)  # who has none at last computes all the same: layers may be gathered
        batch = together[ranks.rank if counts else 0]
        loss = float(objective.loss_sum(batch))
        if counts:
            total += loss
            targets += batch.num_targets
        done += sum(len(each.seq_starts) - 1 for each in together)
        if on_progress:
            on_progress(done, len(data))
    model.train(was_training)
    total, supervised = ranks.total(total, targets)
    return EvalResult(total / supervised, int(supervised))
