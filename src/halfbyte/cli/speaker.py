"""What `halfbyte chat` talks with: the server's engine for one person, and a conversation that fits its context."""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from halfbyte.errors import HalfbyteError
from halfbyte.serve import Engine
from halfbyte.serve.sampling import Sampling
from halfbyte.serve.sequence import Event, Order, ServedAdapter, Token
from halfbyte.serve.text import Texts, Writer

Messages = list[dict[str, str]]


@dataclass
class Answer:
    """What one adapter, or the base, says.

    Attributes:
        reused_tokens: of the prompt, whose keys and values were there already.
        finish: "stop", "length", "cancelled" (by Ctrl-C), or "" while it is being written.
    """

    name: str
    prompt_tokens: int
    reused_tokens: int = 0
    text: str = ""
    new_tokens: int = 0
    finish: str = ""
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0

    @property
    def seconds_to_first_token(self) -> float:
        return (self.first or self.last) - self.started

    @property
    def tokens_per_s(self) -> float:
        """After the first token, which comes with the prompt."""
        return (self.new_tokens - 1) / (self.last - self.first) if self.new_tokens > 1 else 0.0


class Screen(Protocol):
    """Where answers are shown, one after the other."""

    def begin(self, answer: Answer) -> None: ...
    def write(self, text: str) -> None: ...
    def end(self, answer: Answer) -> None: ...


class Speaker:
    """Answers of the base and its adapters. What a prompt begins with is computed once (serve/cache.py)."""

    def __init__(self, engine: Engine, texts: Texts) -> None:
        self._engine, self._texts = engine, texts

    def ask(
        self, served: Sequence[ServedAdapter], prompt: list[int], *, max_tokens: int, sampling: Sampling,
        screen: Screen,
    ) -> list[Answer]:  # fmt: skip
        """One answer of each to the same prompt, written together and shown in turn. Ctrl-C stops them.

        Raises:
            NoAnswerError: a forward pass failed.
            HalfbyteError: the engine has died.
        """
        answers = [Answer(one.name, len(prompt)) for one in served]
        writers = [Writer(self._texts, ()) for _ in served]
        events: queue.SimpleQueue[tuple[int, float, Event]] = queue.SimpleQueue()

        def put(index: int, event: Event) -> None:
            events.put((index, time.perf_counter(), event))

        orders = [
            Order(
                served=one, prompt=prompt, max_tokens=max_tokens, sampling=sampling, stops=self._texts.stops,
                put=partial(put, index),
            )
            for index, one in enumerate(served)
        ]  # fmt: skip
        if not self._engine.alive:
            raise HalfbyteError("the engine died", where="chat", fix="See the log above, and report it")
        sequences = self._engine.submit(orders)
        with ctrl_c(lambda: self._engine.cancel(sequences)):
            for answer, sequence in zip(answers, sequences, strict=True):
                screen.begin(answer)
                written = 0
                while True:
                    screen.write(answer.text[written:])
                    written = len(answer.text)
                    if answer.finish:
                        break
                    _hear(*events.get(), answers, writers)
                answer.reused_tokens = sequence.reused
                screen.end(answer)
        return answers


def _hear(index: int, at: float, event: Event, answers: list[Answer], writers: list[Writer]) -> None:
    answer, writer = answers[index], writers[index]
    answer.last = at
    if isinstance(event, Token):
        answer.first = answer.first or at
        answer.new_tokens += 1
        answer.text += writer.add(event.id)
    elif event.reason == "error":
        raise NoAnswerError(event.error)
    else:
        answer.text += writer.end()
        answer.finish = event.reason


@contextmanager
def ctrl_c(act: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C calls `act`; a second one interrupts as it does outside."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        act()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class NoAnswerError(Exception):
    """A forward pass failed; another may not."""


class TooLongError(Exception):
    """A message that does not fit the context by itself."""


class Conversation:
    """Messages so far, and what of them the model still sees.

    A conversation longer than the context loses its oldest turns until half of the context is free: were it one turn
    at a time, all that follows it would have to be read anew for each message.

    Args:
        most_new: tokens that an answer may have.
    """

    def __init__(self, texts: Texts, system: str, most_new: int) -> None:
        self._texts, self._most_new = texts, most_new
        self.system = system
        self.turns: Messages = []
        self._first = 0

    @property
    def messages(self) -> Messages:
        """All of them, the system's first."""
        return [*self._opening, *self.turns]

    @property
    def _opening(self) -> Messages:
        return [{"role": "system", "content": self.system}] if self.system else []

    def clear(self) -> None:
        self.turns, self._first = [], 0

    def add(self, said: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]

    def take_back(self) -> tuple[str, str] | None:
        """Forget the last message and its answer, and return them; None where there is none."""
        if not self.turns:
            return None
        said, answer = (turn["content"] for turn in self.turns[-2:])
        del self.turns[-2:]
        self._first = min(self._first, len(self.turns))
        return said, answer

    def prompt(self, said: str) -> tuple[list[int], int, int]:
        """Token ids of the conversation and `said`, how many new ones may follow, how many messages were left out now.

        Raises:
            TooLongError: `said` alone is too long.
            ApiError: the model's chat template refuses the conversation.
        """
        context, room = self._texts.context, min(self._most_new, self._texts.context // 4)
        turns, first = [*self.turns, {"role": "user", "content": said}], self._first
        ids = self._ids(turns[first:])
        if len(ids) + room > context:
            while len(ids) > context // 2 and first + 2 < len(turns):
                first += 2
                ids = self._ids(turns[first:])
        if len(ids) >= context:
            raise TooLongError(f"{len(ids)} tokens do not fit a context of {context}")
        left_out, self._first = first - self._first, first
        return ids, min(self._most_new, context - len(ids)), left_out

    def _ids(self, turns: Messages) -> list[int]:
        if not self._texts.chats:
            return self._texts.plain(turns[-1]["content"])
        return self._texts.chat([*self._opening, *turns])
