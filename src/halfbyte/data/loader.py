"""Tokenized samples -> batches without padding; where it stands is (seed, epoch, index) and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from halfbyte.data.pack import pack_sequences
from halfbyte.data.tokenize import IGNORE_INDEX, TokenizedData
from halfbyte.errors import ConfigError, DataError


@dataclass(frozen=True)
class Cursor:
    """The place of the next batch. `dataclasses.asdict` gives its JSON, `Cursor(**json)` reads it."""

    seed: int
    epoch: int = 0
    index: int = 0
    """Packs (with packing) or samples of this epoch that are done."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences end to end in one row of T tokens; see `pack_sequences` for a drawing."""

    input_ids: Tensor
    """(1, T) int64"""
    labels: Tensor
    """(1, T) int64: -100 where not a target, and at the first token of every sequence (the loss shifts)."""
    position_ids: Tensor
    """(1, T) int64: from 0 in every sequence, or from where its parent ends."""
    seq_starts: Tensor
    """(sequences + 1,) int32: cumulative lengths, 0 to T."""
    num_targets: int
    num_tokens: int
    """Tokens of the samples, however many of them stand here."""
    parents: Tensor | None = None
    """(sequences,) int32: the sequence that each goes on from, or -1; None if none does. See `compact`."""


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """One sequence a row, padded on the right."""

    input_ids: Tensor
    """(sequences, longest) int64"""
    labels: Tensor
    """(sequences, longest) int64, -100 in the padding"""
    attention_mask: Tensor
    """(sequences, longest) int64: 1 for a token, 0 for padding"""


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The most tokens, and the most supervised ones, in a batch; tokens of the longest sample."""

    tokens: int
    targets: int
    longest: int
    samples: tuple[int, ...]
    """Of the first batch with the most tokens."""


class BatchLoader:
    """Shuffled batches for training.

    The order of epoch e is ``torch.randperm(n, generator=torch.Generator().manual_seed(seed + e))``. `next_batch` is
    a pure function of its cursor, so a resumed run continues exactly as an uninterrupted one, over epochs too.

    Args:
        data: the samples.
        micro_batch_size: packs (with packing) or samples in a batch; the last batch of an epoch may have fewer.
        packing: put several samples into one sequence of up to `max_seq_len` tokens.
        max_seq_len: tokens of the longest pack.
        seed: of the order.
        rank, world: of the `world` processes that train together this is number `rank`. They share batches of
            `micro_batch_size` each, of which every world-th pack or sample is this one's, perhaps none. The cursor is
            of all together, so as many in one process, with batches `world` times as large, do the same.

    Raises:
        DataError: a sample is longer than `max_seq_len`.
    """

    def __init__(
        self, data: TokenizedData, *, micro_batch_size: int, packing: bool, max_seq_len: int, seed: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        longest = int(data.lengths.max())
        if packing and longest > max_seq_len:
            raise DataError(f"a sample of {longest} tokens does not fit max_seq_len {max_seq_len}")
        self.data = data
        self.micro_batch_size = micro_batch_size
        self.rank, self.world = rank, world
        self._together = micro_batch_size * world
        self.packing = packing
        self.max_seq_len = max_seq_len
        self.seed = seed
        self._plan: tuple[int, list[list[int]]] | None = None  # the last epoch planned: a cache, never a state

    def start(self) -> Cursor:
        """The cursor of the first batch."""
        return Cursor(self.seed)

    def next_batch(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The batch at `cursor`, and the cursor of the one after it (in the next epoch, after the last).

        Raises:
            ConfigError: the cursor has another seed.
            DataError: the cursor lies outside its epoch (the data or the packing has changed).
        """
        if cursor.seed != self.seed:
            raise ConfigError(
                f"the data position is of seed {cursor.seed}, the run has {self.seed}", where="train.seed"
            )
        plan = self._groups(cursor.epoch)
        if not 0 <= cursor.index < len(plan):
            raise DataError(
                f"position {cursor.index} of epoch {cursor.epoch}, which has {len(plan)}", where=self.data.report.path,
                why="the data, or how it is packed, is not that of the saved run",
            )  # fmt: skip
        groups = plan[cursor.index : cursor.index + self._together]
        index = cursor.index + len(groups)
        after = replace(cursor, index=index) if index < len(plan) else Cursor(cursor.seed, cursor.epoch + 1)
        return make_batch(self.data, _joined(groups[self.rank :: self.world])), after

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Batches of one epoch; with packing it may differ a little from epoch to epoch."""
        return -(-len(self._groups(epoch)) // self._together)

    def worst(self, batches: int, needed: Callable[[Batch], Batch] | None = None) -> Worst:
        """The most that any of the first `batches` batches holds, of any rank.

        Args:
            needed: makes of a batch what goes through the model, at most as many tokens: `compact`.
        """
        lengths, targets = self.data.lengths, self.data.targets
        most = Worst(tokens=0, targets=0, longest=int(lengths.max()), samples=())
        epoch = 0
        while batches > 0:
            groups = self._groups(epoch)
            starts = range(0, len(groups), self._together)[:batches]
            together = (groups[start : start + self._together] for start in starts)
            for samples in (_joined(each[rank :: self.world]) for each in together for rank in range(self.world)):
                tokens, learned = int(lengths[samples].sum()), int(targets[samples].sum())
                if needed is not None and tokens > most.tokens:
                    tokens = needed(make_batch(self.data, samples)).input_ids.numel()
                if tokens > most.tokens:
                    most = replace(most, tokens=tokens, samples=tuple(samples))
                if learned > most.targets:
                    most = replace(most, targets=learned)
            batches -= -(-len(groups) // self._together)
            epoch += 1
        return most

    def _groups(self, epoch: int) -> list[list[int]]:
        """The epoch's packs, or its samples as lists of one."""
        if self._plan is None or self._plan[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.data), generator=generator).tolist()
            lengths = self.data.lengths.tolist()
            packs = pack_sequences(lengths, self.max_seq_len, order) if self.packing else [[i] for i in order]
            self._plan = epoch, packs
        return self._plan[1]


def eval_batches(data: TokenizedData, max_tokens: int) -> Iterator[Batch]:
    """All samples in file order, as many in a batch as stay within `max_tokens` (at least one)."""
    group: list[int] = []
    total = 0
    for index, length in enumerate(data.lengths.tolist()):
        if group and total + length > max_tokens:
            yield make_batch(data, group)
            group, total = [], 0
        group.append(index)
        total += length
    if group:
        yield make_batch(data, group)


def _joined(groups: Sequence[list[int]]) -> list[int]:
    return [sample for group in groups for sample in group]


def make_batch(data: TokenizedData, samples: Sequence[int]) -> Batch:
    """The batch of these samples, in this order; of none, one without tokens."""
    if not samples:
        none = torch.zeros(1, 0, dtype=torch.int64)
        starts = torch.zeros(1, dtype=torch.int32)
        return Batch(input_ids=none, labels=none, position_ids=none, seq_starts=starts, num_targets=0, num_tokens=0)
    examples = [data[i] for i in samples]
    lengths = [len(example.input_ids) for example in examples]
    labels = torch.from_numpy(np.concatenate([example.labels for example in examples]))
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([example.input_ids for example in examples]).astype(np.int64))[None],
        labels=labels[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        seq_starts=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        num_targets=int((labels != IGNORE_INDEX).sum()),
        num_tokens=len(labels),
    )


def join_batches(batches: Sequence[Batch]) -> tuple[Batch, list[int]]:
    """All of `batches` as one, end to end, and where each begins and the last ends."""
    bounds = np.cumsum([0, *(batch.input_ids.shape[1] for batch in batches)]).tolist()
    starts = [batch.seq_starts[:-1] + offset for batch, offset in zip(batches, bounds, strict=False)]
    parents: list[int] = []
    for batch in batches:
        above = [-1] * (len(batch.seq_starts) - 1) if batch.parents is None else batch.parents.tolist()
        parents += [parent if parent < 0 else parent + len(parents) for parent in above]
    joined = Batch(
        input_ids=torch.cat([batch.input_ids for batch in batches], dim=1),
        labels=torch.cat([batch.labels for batch in batches], dim=1),
        position_ids=torch.cat([batch.position_ids for batch in batches], dim=1),
        seq_starts=torch.cat([*starts, torch.tensor(bounds[-1:], dtype=torch.int32)]),
        num_targets=sum(batch.num_targets for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        parents=None if max(parents) < 0 else torch.tensor(parents, dtype=torch.int32),
    )  # fmt: skip
    return joined, bounds


def to_padded(batch: Batch, pad_token_id: int = 0) -> PaddedBatch:
    """The same sequences, one a row, for models that cannot take packed rows."""
    lengths = batch.seq_starts.diff().tolist()

    def pad(row: Tensor, value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(torch.split(row[0], lengths)), batch_first=True, padding_value=value
        )

    return PaddedBatch(
        input_ids=pad(batch.input_ids, pad_token_id),
        labels=pad(batch.labels, IGNORE_INDEX),
        attention_mask=pad(torch.ones_like(batch.input_ids), 0),
    )
