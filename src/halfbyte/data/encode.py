"""Rendered text -> token ids and which of them are targets.

The whole text is tokenized at once, so the ids are those the model sees when it is used; the characters each token
covers tell whether it is a target. Only where the author of the data wrote the text of a special token is the text
cut, so that it stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from halfbyte.data.template import Range, Rendered
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int32]
Targets = npt.NDArray[np.bool_]
Tokens = tuple[list[int], list[Range]]
"""Ids, and the characters [start, end) that each covers."""


def encode(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]) -> list[tuple[Ids, Targets]]:
    """Token ids (n,) int32 and targets (n,) bool of each text, with BOS and EOS where the text asks for them.

    Raises:
        DataError: EOS is needed and the tokenizer has none, or it cannot encode a special token's text as text.
    """
    whole = [r.text for r in rendered if not r.plain]
    batch = iter(_tokenize(tokenizer, whole) if whole else [])
    bos = _bos(tokenizer) if any(r.add_bos for r in rendered) else []
    result = []
    for r in rendered:
        ids, ranges = _tokenize_cut(tokenizer, r) if r.plain else next(batch)
        targets = _targets(ranges, r.targets)
        if r.add_bos:
            ids, targets = bos + ids, np.concatenate([np.zeros(len(bos), np.bool_), targets])
        if r.add_eos:
            if tokenizer.eos_token_id is None:
                raise DataError(
                    "the tokenizer has no EOS token", where=r.where, why="the model would not learn to stop",
                    fix="Set eos_token in the tokenizer's tokenizer_config.json",
                )  # fmt: skip
            ids, targets = [*ids, tokenizer.eos_token_id], np.append(targets, np.True_)
        result.append((np.array(ids, np.int32), targets))
    return result


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, as_text: bool = False) -> list[Tokens]:
    # verbose=False: samples over the model's length are counted by the caller, not warned about one by one
    out = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
        split_special_tokens=as_text, verbose=False,
    )  # fmt: skip
    return list(zip(out["input_ids"], out["offset_mapping"], strict=True))


def _tokenize_cut(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> Tokens:
    """As `_tokenize`, with the special-token text in `rendered.plain` encoded as text."""
    all_ids: list[int] = []
    all_ranges: list[Range] = []
    done = 0
    for plain_start, plain_end in [*rendered.plain, (len(rendered.text), len(rendered.text))]:
        for start, end, as_text in ((done, plain_start, False), (plain_start, plain_end, True)):
            if start == end:
                continue
            ids, ranges = _tokenize_piece(tokenizer, rendered.text[start:end], as_text, at_start=start == 0)
            if as_text and not set(ids).isdisjoint(tokenizer.all_special_ids):
                raise DataError(
                    f"cannot encode {rendered.text[start:end]!r} as text",
                    where=rendered.where,
                    why="the tokenizer makes a special token of it in any case",
                    fix="Remove it from the data",
                )
            all_ids += ids
            all_ranges += [(a + start, b + start) for a, b in ranges]
        done = plain_end
    return all_ids, all_ranges


def _tokenize_piece(tokenizer: PreTrainedTokenizerBase, piece: str, as_text: bool, *, at_start: bool) -> Tokens:
    """Tokens of a piece of a text. After a newline, since some tokenizers put a space before the first word."""
    if not at_start:
        ((newline, _),) = _tokenize(tokenizer, ["\n"])
        ((ids, ranges),) = _tokenize(tokenizer, ["\n" + piece], as_text=as_text)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :], [(max(a - 1, 0), b - 1) for a, b in ranges[len(newline) :]]
    ((ids, ranges),) = _tokenize(tokenizer, [piece], as_text=as_text)
    return ids, ranges


def _targets(ranges: Sequence[Range], targets: Sequence[Range]) -> Targets:
    """Which tokens cover a character of a target. A token of white space alone may cover none: it ends there."""
    starts, ends = np.array(ranges, np.int64).reshape(-1, 2).T
    result = np.zeros(len(ranges), np.bool_)
    for start, end in targets:
        result |= (ends > start) & np.where(starts < ends, starts < end, ends <= end)
    return result


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("")["input_ids"] else []
