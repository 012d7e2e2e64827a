"""A few held-out prompts answered before and after: the base and the tuned model side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from halfbyte.data import IGNORE_INDEX, TokenizedData
from halfbyte.model.generate import generate_ids

NUM_ANSWERS = 3
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """One prompt: what the data says, what the base says, what the tuned model says."""

    prompt: str
    expected: str
    before: str
    after: str


def answer_samples(model: Any, tokenizer: PreTrainedTokenizerBase, data: TokenizedData) -> list[Answer]:
    """Greedy answers to the first samples of `data` that begin with something that is not learned."""
    prompts: list[list[int]] = []
    expected: list[list[int]] = []
    for index in range(len(data)):
        example = data[index]
        first = int((example.labels != IGNORE_INDEX).argmax())
        if first > 1 and len(prompts) < NUM_ANSWERS:
            learned = example.labels[first:] != IGNORE_INDEX
            end = first + (int((~learned).argmax()) if not learned.all() else len(learned))
            prompts.append(example.input_ids[:first].tolist())
            expected.append(example.input_ids[first:end].tolist())
    if not prompts:
        return []
    after = generate_ids(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)
    with model.disable_adapter():
        before = generate_ids(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    return [Answer(*map(text, row)) for row in zip(prompts, expected, before, after, strict=True)]


def page(answers: list[Answer]) -> str:
    """The answers as Markdown."""
    parts = ["# Held-out prompts, before and after\n"]
    for answer in answers:
        parts.append(f"## {' '.join(answer.prompt.split())}\n")
        rows = {"expected": answer.expected, "before": answer.before, "after": answer.after}
        parts += [f"**{name}**\n\n> " + text.replace("\n", "\n> ") + "\n" for name, text in rows.items()]
    return "\n".join(parts)
