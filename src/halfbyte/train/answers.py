"""A few held-out prompts answered before and after: the base and the tuned model side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from halfbyte.config import DataConfig
from halfbyte.data import IGNORE_INDEX, Record, RecordReader, TokenizedData
from halfbyte.model.generate import generate_ids
from halfbyte.report import Answer

NUM_ANSWERS = 3
MAX_NEW_TOKENS = 64


def answer_samples(
    model: Any, tokenizer: PreTrainedTokenizerBase, data: TokenizedData, config: DataConfig
) -> list[Answer]:
    """Greedy answers to the first samples of `data` that are dialogues; none for running text."""
    samples: list[tuple[int, str]] = []
    for record in RecordReader.from_config(data.report.path, config):
        if len(samples) == NUM_ANSWERS:
            break
        index = int(np.searchsorted(data.lines, record.line))
        if record.messages and index < len(data) and data.lines[index] == record.line:
            samples.append((index, _asked(record)))
    if not samples:
        return []
    targets = [data[index].labels != IGNORE_INDEX for index, _ in samples]
    starts = [int(target.argmax()) for target in targets]
    prompts = [data[i].input_ids[:start].tolist() for (i, _), start in zip(samples, starts, strict=True)]
    expected = [
        data[i].input_ids[start : start + _run(target[start:])].tolist()
        for (i, _), start, target in zip(samples, starts, targets, strict=True)
    ]
    after = generate_ids(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)
    with model.disable_adapter():
        before = generate_ids(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    rows = zip(samples, expected, before, after, strict=True)
    return [Answer(asked, *map(text, answers)) for (_, asked), *answers in rows]


def _asked(record: Record) -> str:
    """What was said just before the first answer."""
    first = next(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    return str(record.messages[first - 1]["content"])


def _run(target: npt.NDArray[np.bool_]) -> int:
    """Length of the run of True that `target` begins with."""
    return int((~target).argmax()) if not target.all() else len(target)
