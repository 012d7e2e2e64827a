"""Records -> token ids with a target mask, checked and held compactly."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from halfbyte.config import DataConfig
from halfbyte.data.deadline import in_time
from halfbyte.data.encode import encode
from halfbyte.data.records import RecordReader
from halfbyte.data.template import ChatTemplate, Rendered, too_slow
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""The label of a token that is not a target (torch's and transformers' convention)."""

_CHUNK = 256  # samples tokenized together: enough for the tokenizer's threads, few enough to stay small


@dataclass(frozen=True)
class Example:
    """One sample: `input_ids` (n,) int32 and `labels` (n,) int64, aligned (the loss shifts); labels[0] is -100."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of a file."""

    path: str
    sha256: str
    """Of the file's bytes: a resumed run needs the same file."""
    format: str
    read: int
    kept: int
    dropped: dict[str, int]
    """Reason -> records."""
    tokens: int
    supervised_tokens: int
    longest: int
    """Tokens of the longest sample kept."""
    duplicates: int
    """Kept samples that equal an earlier one."""
    notes: tuple[str, ...] = ()

    @property
    def supervised_share(self) -> float:
        """Supervised tokens / tokens."""
        return self.supervised_tokens / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "notes": list(self.notes), "supervised_share": round(self.supervised_share, 6)}


@dataclass(frozen=True, kw_only=True)
class TokenizedData:
    """All samples of a file, end to end; sample i is [offsets[i], offsets[i + 1])."""

    input_ids: npt.NDArray[np.int32]
    """(tokens,)"""
    is_target: npt.NDArray[np.bool_]
    """(tokens,); never at the first token of a sample: nothing predicts it."""
    offsets: npt.NDArray[np.int64]
    """(samples + 1,)"""
    lines: npt.NDArray[np.int64]
    """(samples,): the line of the file each sample came from."""
    report: DataReport

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self.offsets[index], self.offsets[index + 1])
        ids = self.input_ids[part]
        return Example(ids, np.where(self.is_target[part], ids, IGNORE_INDEX).astype(np.int64))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(samples,) int64: tokens of each sample."""
        return np.diff(self.offsets)

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """(samples,) int64: supervised tokens of each sample."""
        return np.add.reduceat(self.is_target, self.offsets[:-1], dtype=np.int64)

    def fingerprints(self) -> list[bytes]:
        """A hash of each sample's tokens and targets."""
        parts = (slice(a, b) for a, b in itertools.pairwise(self.offsets))
        return [_fingerprint(self.input_ids[part], self.is_target[part]) for part in parts]


def load_data(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, vocab_size: int | None = None
) -> TokenizedData:
    """Read, render and tokenize a JSONL file.

    Args:
        path: the file (not taken from `config`, which has two).
        tokenizer: a fast tokenizer.
        config: format, max_seq_len, mask_prompt, on_long and on_bad_line are used.
        vocab_size: rows of the model's embedding; ids beyond are refused.

    Raises:
        DataError: a record cannot be used (unless skipped), a sample is too long (on_long="error"), the tokenizer
            does not fit, or no sample is left (naming why each was dropped).
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is a slow one", why="tokens must know their characters", fix="Use a fast one")
    template = ChatTemplate(tokenizer)
    reader = RecordReader.from_config(path, config, template.roles)
    builder = _Builder(reader, tokenizer, config, vocab_size)
    rendered = _render_all(reader, template)
    while chunk := _next_chunk(rendered, reader):
        builder.add(chunk)
    return builder.finish()


def count_overlap(train: TokenizedData, held_out: TokenizedData) -> int:
    """How many samples of `held_out` are also in `train`, token for token."""
    known = set(train.fingerprints())
    return sum(fingerprint in known for fingerprint in held_out.fingerprints())


def _fingerprint(ids: npt.NDArray[np.int32], targets: npt.NDArray[np.bool_]) -> bytes:
    return hashlib.blake2b(ids.tobytes() + targets.tobytes(), digest_size=16).digest()


def _render_all(reader: RecordReader, template: ChatTemplate) -> Iterator[tuple[int, Rendered]]:
    for record in reader:
        try:
            rendered = template.render(record, reader.where(record.line))
        except DataError as error:
            if not template.exists:
                raise  # no line of the file could mend that
            reader.reject(error)
            continue
        yield record.line, rendered


def _next_chunk(rendered: Iterator[tuple[int, Rendered]], reader: RecordReader) -> list[tuple[int, Rendered]]:
    """The next `_CHUNK` samples; empty at the end. A template that does not come to an end is stopped."""
    try:
        return in_time(lambda: list(itertools.islice(rendered, _CHUNK)), lambda: reader.line)
    except TimeoutError as error:
        raise too_slow(error, reader.where(reader.line)) from None


class _Builder:
    """Collects samples and what there is to say about them."""

    def __init__(
        self, reader: RecordReader, tokenizer: PreTrainedTokenizerBase, config: DataConfig, vocab_size: int | None
    ) -> None:
        self.reader, self.tokenizer, self.config, self.vocab_size = reader, tokenizer, config, vocab_size
        self.ids, self.targets, self.lines, self.offsets = array("i"), bytearray(), array("q"), array("q", [0])
        self.seen: set[bytes] = set()
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def add(self, chunk: Sequence[tuple[int, Rendered]]) -> None:
        encoded = encode(self.tokenizer, [rendered for _, rendered in chunk])
        for (line, rendered), (ids, targets) in zip(chunk, encoded, strict=True):
            self.counts["special text"] += bool(rendered.plain)
            self.counts["templated"] += self.reader.format == "prompt" and not rendered.add_bos
            self.counts["added eos"] += rendered.add_eos and not rendered.add_bos
            self._add_sample(line, rendered, ids, targets)

    def _add_sample(
        self, line: int, rendered: Rendered, ids: npt.NDArray[np.int32], targets: npt.NDArray[np.bool_]
    ) -> None:
        self._check_ids(rendered, ids)
        longest = self.config.max_seq_len
        if not self.config.mask_prompt:
            targets = np.ones_like(targets)
        targets[:1] = False
        if len(ids) > longest:
            if self.config.on_long == "error":
                raise DataError(
                    f"a sample of {len(ids)} tokens", where=rendered.where, why=f"max_seq_len is {longest}",
                    fix="Raise data.max_seq_len, or set data.on_long to skip or truncate",
                )  # fmt: skip
            if self.config.on_long == "skip":
                self.dropped["longer than max_seq_len"] += 1
                return
            self.counts["truncated"] += 1
            ids, targets = ids[:longest], targets[:longest]
        if not targets.any():
            self.dropped["no supervised tokens"] += 1
            return
        fingerprint = _fingerprint(ids, targets)
        self.counts["duplicate"] += fingerprint in self.seen
        self.seen.add(fingerprint)
        self.ids.frombytes(ids.tobytes())
        self.targets += targets.tobytes()
        self.lines.append(line)
        self.offsets.append(len(self.ids))

    def _check_ids(self, rendered: Rendered, ids: npt.NDArray[np.int32]) -> None:
        bos = self.tokenizer.bos_token_id
        if not rendered.add_bos and bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise DataError(
                "two BOS tokens at the start", where=rendered.where, why="the chat template prints both",
                fix="Remove one from the tokenizer's chat template",
            )  # fmt: skip
        if self.vocab_size is not None and len(ids) and ids.max() >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise DataError(
                f"token {token!r} has id {ids.max()}", where=rendered.where,
                why=f"the model's vocabulary ends at {self.vocab_size - 1}",
                fix="Use the tokenizer that belongs to the model",
            )  # fmt: skip

    def finish(self) -> TokenizedData:
        reader, dropped = self.reader, dict(self.reader.dropped + self.dropped)
        if not self.lines:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            why = f"{reader.read} read" + (f": {reasons}" if reasons else "")
            raise DataError("no training samples", where=reader.path, why=why)
        offsets, is_target = np.frombuffer(self.offsets, np.int64), np.frombuffer(self.targets, np.bool_)
        return TokenizedData(
            input_ids=np.frombuffer(self.ids, np.int32),
            is_target=is_target,
            offsets=offsets,
            lines=np.frombuffer(self.lines, np.int64),
            report=DataReport(
                path=reader.path, sha256=reader.sha256, format=reader.format, read=reader.read, kept=len(self.lines),
                dropped=dropped, tokens=len(self.ids), supervised_tokens=int(np.count_nonzero(is_target)),
                longest=int(np.diff(offsets).max()), duplicates=self.counts["duplicate"], notes=self._notes(),
            ),
        )  # fmt: skip

    def _notes(self) -> tuple[str, ...]:
        counts, reader = self.counts, self.reader
        texts = {
            "templated": "prompt and completion stand in the chat template as user and assistant",
            "added eos": "{} samples: the chat template ends in no end token, EOS is appended",
            "special text": "{} samples hold the text of a special token; it is encoded as text, not as the token",
            "truncated": "{} samples truncated to max_seq_len: they do not show where the answer ends",
            "duplicate": "{} samples equal an earlier one",
        }
        notes = [text.format(counts[key]) for key, text in texts.items() if counts[key]]
        if reader.unused_fields:
            notes.append("fields not used: " + ", ".join(sorted(reader.unused_fields)[:12]))
        return (*notes, *(f"first dropped as {reason!r}: {text}" for reason, text in reader.first_dropped.items()))
