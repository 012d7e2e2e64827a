"""The learning rate is transformers' after the warm-up, and no step is spent at 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from halfbyte.optim import learning_rate

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def transformers_rates(name: str, warmup: int, steps: int) -> list[float]:
    """The rate each optimizer step 1..steps+1 runs with."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    scheduler = get_scheduler(NAMES[name], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", list(NAMES))
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_matches_transformers(schedule: str, warmup: int) -> None:
    theirs = transformers_rates(schedule, warmup, 50)
    ours = [learning_rate(step, lr=2e-4, schedule=schedule, warmup_steps=warmup, steps=50) for step in range(1, 52)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], rel=1e-12), "in the warm-up, one step ahead"
    assert min(ours[:50]) > 0


def test_the_table_in_the_docstring() -> None:
    rows = [line.split() for line in (learning_rate.__doc__ or "").splitlines()]
    for row in rows:
        if row and row[0] in NAMES and len(row) == 7:
            got: list[Any] = [
                learning_rate(step, lr=1.0, schedule=row[0], warmup_steps=2, steps=6) for step in range(1, 7)
            ]
            assert got == pytest.approx([float(value) for value in row[1:]], abs=0.005)
            rows = [each for each in rows if each != row]
    assert not any(row and row[0] in NAMES and len(row) == 7 for row in rows)


def test_warm_up_starts_at_one_tenth_and_one_step_learns() -> None:
    assert learning_rate(1, lr=1e-3, schedule="linear", warmup_steps=10, steps=100) == pytest.approx(1e-4)
    for schedule in NAMES:
        assert learning_rate(1, lr=1e-3, schedule=schedule, warmup_steps=0, steps=1) == 1e-3
    assert learning_rate(9, lr=1e-3, schedule="constant", warmup_steps=10, steps=5) == pytest.approx(9e-4)
