"""A compact batch holds every sample's tokens and targets, and no more pieces than it must."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import pytest
import torch

from halfbyte.data import Batch, compact

Sample = tuple[list[int], list[int]]
"""Token ids, and the places of those that are targets."""


def batch_of(samples: list[Sample]) -> Batch:
    """Samples end to end."""
    labels = [[token if i in targets else -100 for i, token in enumerate(ids)] for ids, targets in samples]
    return Batch(
        input_ids=torch.tensor([[token for ids, _ in samples for token in ids]]),
        labels=torch.tensor([[label for row in labels for label in row]]),
        position_ids=torch.tensor([[i for ids, _ in samples for i in range(len(ids))]]),
        seq_starts=torch.tensor([0, *accumulate(len(ids) for ids, _ in samples)], dtype=torch.int32),
        num_targets=sum(len(targets) for _, targets in samples), num_tokens=sum(len(ids) for ids, _ in samples),
    )  # fmt: skip


def unfold(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """What every token with a target has before it, itself included, and that target: sorted."""
    ids, positions, labels = (row[0].tolist() for row in (batch.input_ids, batch.position_ids, batch.labels))
    bounds = list(pairwise(batch.seq_starts.tolist()))
    parents = [-1] * len(bounds) if batch.parents is None else batch.parents.tolist()
    before: dict[int, list[int]] = {-1: []}
    found = []
    for s, (start, stop) in enumerate(bounds):
        before[s] = before[parents[s]] + ids[start:stop]
        assert positions[start:stop] == list(range(len(before[parents[s]]), len(before[s])))
        for t in range(start, min(stop, len(labels) - 1)):
            if labels[t + 1] != -100:
                found.append((before[parents[s]] + ids[start : t + 1], labels[t + 1]))
    return sorted(found)


def expected(samples: list[Sample]) -> list[tuple[list[int], int]]:
    return sorted((ids[:t], ids[t]) for ids, targets in samples for t in targets)


def check(samples: list[Sample], least_saved: int = 1) -> Batch:
    before = batch_of(samples)
    result = compact(before, least_saved)
    assert unfold(result) == expected(samples)
    assert result.labels.shape == result.input_ids.shape == result.position_ids.shape
    assert (result.num_targets, result.num_tokens) == (before.num_targets, before.num_tokens)
    assert result.input_ids.shape[1] <= before.num_tokens
    return result


def test_what_it_makes_of_three_samples() -> None:
    samples = [([1, 2, 3, 4, 5, 6], [4]), ([1, 2, 7, 8, 9], [3, 4]), ([1, 2, 3, 9, 6], [4])]
    result = check(samples)
    assert result.input_ids.tolist() == [[1, 2, 3, 4, 9, 7, 8, 9]]
    assert result.position_ids.tolist() == [[0, 1, 2, 3, 3, 2, 3, 4]]
    assert result.labels.tolist() == [[-100, -100, -100, -100, 5, 6, 8, 9]]
    assert result.seq_starts.tolist() == [0, 2, 3, 4, 5, 8]
    assert result.parents is not None
    assert result.parents.tolist() == [-1, 0, 1, 1, 0]


def test_a_piece_must_save_enough() -> None:
    samples = [([1, 2, 3, 4, 5], [4]), ([1, 2, 7, 8, 9], [3, 4]), ([1, 2, 3, 9, 6], [4])]
    result = check(samples, least_saved=2)
    assert result.seq_starts.numel() - 1 == 4  # 1 2, and what follows it in each
    assert check(samples, least_saved=5).parents is None


@pytest.mark.parametrize(
    "samples",
    [
        [([1, 2, 3], [2])],
        [([1, 2, 3, 4, 4, 4], [1])],
        [([1, 2, 3], [1, 2]), ([1, 2, 3], [1, 2])],  # every token is learned: the first one is all they share
        [([5, 5], [1]), ([5, 5], [1]), ([5, 5, 5], [2])],
        [([1, 2, 3, 4], [3]), ([1, 2, 3, 4], [3]), ([1, 2, 3, 4], [2, 3])],
        [([1, 2, 3, 9], [3]), ([1, 2, 3, 4, 5, 6], [5])],
        [([1, 2], []), ([1, 2, 3, 4], [3]), ([7], []), ([1, 2, 5, 4], [3])],
    ],
)
def test_edges(samples: list[Sample]) -> None:
    """One sample, tails, equal samples, one that ends where others go on, samples without a target."""
    check(samples)


def test_without_a_target_nothing_changes() -> None:
    batch = batch_of([([1, 2, 3], []), ([1, 2, 4], [])])
    assert compact(batch) is batch


def test_any_samples() -> None:
    generator = random.Random(0)
    for _ in range(300):
        samples = []
        for _ in range(generator.randint(1, 9)):
            ids = [generator.choice((1, 1, 1, 2)) for _ in range(generator.randint(1, 14))]
            samples.append((ids, [i for i in range(1, len(ids)) if generator.random() < 0.2]))
        if any(targets for _, targets in samples):
            check(samples, generator.choice((1, 3, 8)))
