"""The learning rate as a function of the step, and of nothing else: a resumed run cannot get it wrong."""

from __future__ import annotations

import math

from halfbyte.config.running import warmup_of


def learning_rate(step: int, *, lr: float, schedule: str, warmup_steps: float, steps: int) -> float:
    """The learning rate of optimizer step `step`.

    Warm-up rises linearly from 0 and reaches `lr` at its last step. Then `linear` and `cosine` fall towards 0, which
    the step after the last would have, so that no step is spent at 0. With lr=1, warmup_steps=2, steps=6::

        step        1     2     3     4     5     6
        constant    0.5   1     1     1     1     1
        linear      0.5   1     1     0.75  0.5   0.25
        cosine      0.5   1     1     0.85  0.5   0.15

    After the warm-up this is transformers' `get_{constant,linear,cosine}_schedule_with_warmup` at the same step; in
    the warm-up it is one step ahead of them, whose first step has a learning rate of 0.

    Args:
        step: 1 is the first optimizer step, `steps` the last; beyond it linear and cosine stay at 0.
        lr: the peak.
        schedule: "constant", "linear" or "cosine".
        warmup_steps: steps of the warm-up, counted in `steps`; below 1: their share of `steps`.
        steps: optimizer steps of the whole run.
    """
    assert step >= 1, "steps count from 1"
    warmup = warmup_of(warmup_steps, steps)
    if step <= warmup:
        return lr * (step / warmup)
    done = min(1.0, (step - 1 - warmup) / max(1, steps - warmup))
    match schedule:
        case "constant":
            return lr
        case "linear":
            return lr * (1.0 - done)
        case "cosine":
            return lr * 0.5 * (1.0 + math.cos(math.pi * done))
    raise AssertionError(f"no schedule {schedule!r}")
