"""Batches: no sample lost or doubled, no label across a boundary, and the cursor is all there is to resume from."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.data import (
    IGNORE_INDEX,
    Batch,
    BatchLoader,
    Cursor,
    DataReport,
    TokenizedData,
    eval_batches,
    make_batch,
    pack_sequences,
    to_padded,
)
from halfbyte.errors import ConfigError, DataError


def make_data(n: int = 50, longest: int = 40, seed: int = 0) -> TokenizedData:
    """Sample i consists of tokens 1000 i, 1000 i + 1, ..., so that a batch shows where each token comes from."""
    rng = random.Random(seed)
    lengths = [rng.randint(2, longest) for _ in range(n)]
    ids = np.concatenate([np.arange(length, dtype=np.int32) + 1000 * i for i, length in enumerate(lengths)])
    targets = ids % 1000 > 0
    report = DataReport(
        path="data.jsonl", sha256="", format="text", read=n, kept=n, dropped={}, tokens=len(ids),
        supervised_tokens=int(targets.sum()), longest=max(lengths), duplicates=0,
    )  # fmt: skip
    return TokenizedData(
        input_ids=ids, is_target=targets, offsets=np.cumsum([0, *lengths]), lines=np.arange(n) + 1, report=report
    )


def make_loader(data: TokenizedData, *, packing: bool, micro_batch_size: int = 2, seed: int = 0) -> BatchLoader:
    return BatchLoader(data, micro_batch_size=micro_batch_size, packing=packing, max_seq_len=64, seed=seed)


def samples_of(batch) -> list[int]:
    return [int(batch.input_ids[0, start]) // 1000 for start in batch.seq_starts[:-1]]


def run(loader: BatchLoader, cursor: Cursor, steps: int):
    batches = []
    for _ in range(steps):
        batch, cursor = loader.next_batch(cursor)
        batches.append(batch)
    return batches, cursor


@pytest.mark.parametrize("seed", range(20))
def test_packs_hold_every_sample_once_and_fit(seed) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 128) for _ in range(rng.randint(1, 400))]
    order = rng.sample(range(len(lengths)), len(lengths))
    packs = pack_sequences(lengths, 128, order)
    assert sorted(i for pack in packs for i in pack) == sorted(order)
    assert all(0 < sum(lengths[i] for i in pack) <= 128 for pack in packs)
    assert packs == pack_sequences(lengths, 128, order)


@pytest.mark.parametrize("mean", [50, 120, 300])
def test_packs_are_well_filled_and_keep_near_the_order(mean) -> None:
    rng = random.Random(0)
    lengths = [min(1024, max(8, int(rng.lognormvariate(0, 0.8) * mean))) for _ in range(5000)]
    packs = pack_sequences(lengths, 1024, range(5000))
    assert sum(lengths) / (1024 * len(packs)) > 0.95
    place = {index: k for k, pack in enumerate(packs) for index in pack}
    moved = [abs(place[i] - i * len(packs) / 5000) for i in range(5000)]
    assert sum(moved) / len(moved) < 24


def test_packing_edges() -> None:
    assert pack_sequences([], 8, []) == []
    assert pack_sequences([8, 8], 8, [1, 0]) == [[1], [0]]
    assert pack_sequences([3, 2, 4], 9, [2, 0]) == [[2, 0]]
    with pytest.raises(ValueError, match="sample 0 has 9 tokens, more than max_seq_len 8"):
        pack_sequences([9], 8, [0])


def test_a_batch_is_one_row_with_boundaries() -> None:
    data = make_data()
    batch = make_batch(data, [3, 0, 7])
    lengths = data.lengths[[3, 0, 7]].tolist()
    assert batch.seq_starts.tolist() == np.cumsum([0, *lengths]).tolist()
    assert batch.seq_starts.dtype == torch.int32
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, sum(lengths))
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}
    assert batch.position_ids[0].tolist() == [p for length in lengths for p in range(length)]
    assert batch.num_tokens == sum(lengths)
    assert batch.num_targets == sum(lengths) - 3 == (batch.labels != IGNORE_INDEX).sum()
    # a label predicts from the token before it: that one must be of the same sequence
    where = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
    assert (batch.input_ids[0, where] // 1000 == batch.input_ids[0, where - 1] // 1000).all()
    assert not set(where.tolist()) & set(batch.seq_starts.tolist())


@pytest.mark.parametrize("seed", [0, 7])
def test_the_order_is_that_of_randperm(seed) -> None:
    data = make_data()
    loader = make_loader(data, packing=False, micro_batch_size=3, seed=seed)
    cursor = loader.start()
    for epoch in range(3):
        batches, cursor = run(loader, cursor, loader.batches_per_epoch(epoch))
        assert cursor == Cursor(seed, epoch + 1, 0)
        order = torch.randperm(50, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        assert [i for batch in batches for i in samples_of(batch)] == order
        assert len(samples_of(batches[-1])) == 50 % 3


@pytest.mark.parametrize("packing", [True, False])
def test_resumed_equals_uninterrupted_over_three_epochs(packing) -> None:
    data = make_data()
    steps = sum(make_loader(data, packing=packing).batches_per_epoch(e) for e in range(3)) + 2
    whole, _ = run(make_loader(data, packing=packing), Cursor(0), steps)
    cursor, resumed = Cursor(0), []
    while len(resumed) < steps:  # a new loader for every batch, the cursor through JSON
        cursor = Cursor(**json.loads(json.dumps(dataclasses.asdict(cursor))))
        (batch,), cursor = run(make_loader(make_data(), packing=packing), cursor, 1)
        resumed.append(batch)
    for a, b in zip(whole, resumed, strict=True):
        assert all(
            torch.equal(getattr(a, name), getattr(b, name))
            for name in ("input_ids", "labels", "position_ids", "seq_starts")
        )


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_every_sample_once(packing) -> None:
    data = make_data()
    loader = make_loader(data, packing=packing)
    cursor, orders = loader.start(), []
    for epoch in range(3):
        batches, cursor = run(loader, cursor, loader.batches_per_epoch(epoch))
        orders.append([i for batch in batches for i in samples_of(batch)])
        assert sorted(orders[-1]) == list(range(50))
        assert all(batch.num_tokens <= 2 * 64 for batch in batches)
    assert (cursor.epoch, cursor.index) == (3, 0)
    assert orders[0] != orders[1] != orders[2]


def test_asking_ahead_changes_nothing() -> None:
    loader = make_loader(make_data(), packing=True)
    first, after = loader.next_batch(Cursor(0))
    loader.batches_per_epoch(5)
    loader.next_batch(Cursor(0, 2, 1))
    again, after_again = loader.next_batch(Cursor(0))
    assert torch.equal(first.input_ids, again.input_ids)
    assert after == after_again


def test_cursors_that_do_not_belong() -> None:
    loader = make_loader(make_data(), packing=False)
    with pytest.raises(ConfigError, match=r"train\.seed: the data position is of seed 3, the run has 0"):
        loader.next_batch(Cursor(3))
    with pytest.raises(DataError, match=r"data\.jsonl: position 50 of epoch 0, which has 50: the data, or how"):
        loader.next_batch(Cursor(0, 0, 50))
    with pytest.raises(DataError, match=r"a sample of 40 tokens does not fit max_seq_len 8"):
        BatchLoader(make_data(), micro_batch_size=1, packing=True, max_seq_len=8, seed=0)


def test_eval_batches_are_in_order_and_bounded() -> None:
    data = make_data()
    batches = list(eval_batches(data, 100))
    assert [i for batch in batches for i in samples_of(batch)] == list(range(50))
    assert all(batch.num_tokens <= 100 for batch in batches)
    assert sum(batch.num_targets for batch in batches) == data.report.supervised_tokens
    assert len(list(eval_batches(data, 1))) == 50


def test_padded_rows_hold_the_same_sequences() -> None:
    data = make_data()
    batch = make_batch(data, [3, 0, 7])
    padded = to_padded(batch, pad_token_id=9)
    assert padded.input_ids.shape == (3, data.lengths[[3, 0, 7]].max())
    assert padded.attention_mask.sum() == batch.num_tokens
    real = padded.attention_mask.bool()
    assert torch.equal(padded.input_ids[real], batch.input_ids[0])
    assert torch.equal(padded.labels[real], batch.labels[0])
    assert (padded.input_ids[~real] == 9).all()
    assert (padded.labels[~real] == IGNORE_INDEX).all()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_what_one_process_takes(packing: bool, world: int) -> None:
    """Over two epochs and what is left over at their ends, in the same number of batches."""
    data = make_data()
    settings: dict[str, Any] = {"packing": packing, "max_seq_len": 64, "seed": 1}
    alone = BatchLoader(data, micro_batch_size=2 * world, **settings)
    ranks = [BatchLoader(data, micro_batch_size=2, rank=rank, world=world, **settings) for rank in range(world)]
    cursor = alone.start()
    worst = 0
    for _ in range(alone.batches_per_epoch(0) + alone.batches_per_epoch(1)):
        whole, after = alone.next_batch(cursor)
        parts = [rank.next_batch(cursor) for rank in ranks]
        assert {each for _, each in parts} == {after}
        tokens = [tuple(ids) for batch, _ in parts for ids in split(batch)]
        assert sorted(tokens) == sorted(tuple(ids) for ids in split(whole))
        worst = max(worst, *(batch.num_tokens for batch, _ in parts))
        cursor = after
    assert cursor.epoch == 2
    steps = ranks[0].batches_per_epoch(0) + ranks[0].batches_per_epoch(1)
    assert [rank.worst(steps).tokens for rank in ranks] == [worst] * world


def split(batch: Batch) -> list[list[int]]:
    bounds = batch.seq_starts.tolist()
    return [batch.input_ids[0, a:b].tolist() for a, b in pairwise(bounds)]
