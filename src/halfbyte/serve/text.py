"""Text to tokens and back, for a server: templates with a deadline, answers piece by piece, stop strings."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from halfbyte.data.deadline import in_time
from halfbyte.serve.errors import ApiError

CHARACTERS_PER_TOKEN = 64
"""A prompt of more than so many for each token of the context is not even tokenized."""


class Texts:
    """The tokenizer for all requests; its methods are slow enough to be called off the event loop.

    Args:
        stops: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stops: Sequence[int], context: int) -> None:
        self.tokenizer: Any = tokenizer
        self._lock = threading.Lock()  # a tokenizer's settings change while it encodes
        self._most = context * CHARACTERS_PER_TOKEN
        self.stops, self.context, self.vocab_size = frozenset(stops), context, len(tokenizer)
        self.chats = bool(tokenizer.chat_template)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks.

        Raises:
            ApiError: the template refuses the conversation, or takes too long.
        """
        if not self.chats:
            raise ApiError(400, "this model has no chat template: use /v1/completions", param="messages")
        self._check(sum(len(message["content"]) for message in messages), "messages")
        try:
            text = in_time(
                lambda: self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            )
        except TimeoutError:
            raise ApiError(400, "the model's chat template takes too long for this", param="messages") from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ApiError(400, f"the model's chat template: {error}"[:300], param="messages") from None
        return self._encode(text, special=False)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer puts before it."""
        self._check(len(text), "prompt")
        return self._encode(text, special=True)

    def token(self, token: int) -> str:
        """The text of one token."""
        return str(self.tokenizer.decode([token]))

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        with self._lock:
            return list(self.tokenizer(text, add_special_tokens=special).input_ids)

    def _check(self, characters: int, param: str) -> None:
        if characters > self._most:
            raise ApiError(
                400, f"{characters} characters are more than a context of {self.context} tokens holds", param=param,
                code="context_length_exceeded",
            )  # fmt: skip


class Writer:
    """The text of an answer as its tokens come; half a character, or of a stop string, waits for the other half."""

    def __init__(self, texts: Texts, stops: Sequence[str]) -> None:
        self._texts, self._stops = texts, stops
        self._ids: list[int] = []
        self._context = self._read = 0  # tokens that are decoded along, and those whose text is out
        self._held = ""
        self.stopped = False

    def add(self, *tokens: int) -> str:
        """Text that is certain now."""
        self._ids += tokens
        before = self._texts.decode(self._ids[self._context : self._read])
        text = self._texts.decode(self._ids[self._context :])
        if text.endswith("�") and len(self._ids) - self._read < 8:
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(self._held + text[len(before) :], last=False)

    def end(self) -> str:
        """What is left."""
        before = self._texts.decode(self._ids[self._context : self._read])
        return self._release(self._held + self._texts.decode(self._ids[self._context :])[len(before) :], last=True)

    def _release(self, text: str, *, last: bool) -> str:
        self._held = ""
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if last:
            return text
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
