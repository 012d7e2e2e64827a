"""From the engine's events to what a client reads: one request's choices, in pieces or as a whole."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from halfbyte.serve.engine import Engine, FullError, StoppedError
from halfbyte.serve.errors import ApiError
from halfbyte.serve.sequence import Event, Finished, Order, Sequence, Token
from halfbyte.serve.text import Texts, Writer

RETRY_SECONDS = 1


@dataclass(frozen=True)
class Piece:
    """New text of one choice, the tokens since its last piece, and why it ended, if it did."""

    index: int
    text: str
    tokens: list[Token]
    finish: str | None = None


@dataclass
class Request:
    """One request in the engine.

    Attributes:
        orders: one for each choice, without `put`.
        stops: texts that end an answer.
        in_pieces: tokens are wanted as they come, not all of an answer at its end.
        usage: a stream ends with how many there were.
        echo: the prompt's text begins the answer's.
    """

    engine: Engine
    texts: Texts
    orders: list[dict[str, Any]]
    stops: list[str]
    chat: bool
    name: str
    in_pieces: bool = False
    usage: bool = False
    echo: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _events: asyncio.Queue[tuple[int, list[Event]]] = field(default_factory=asyncio.Queue)
    _sequences: list[Sequence] = field(default_factory=list)
    new_tokens: int = 0

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex

    def start(self) -> None:
        """Raises ApiError where the engine takes no more."""
        loop = asyncio.get_running_loop()
        orders = [
            Order(**order, put=_sender(loop, self._events, index, at_once=self.in_pieces or bool(self.stops)))
            for index, order in enumerate(self.orders)
        ]
        try:
            self._sequences = self.engine.submit(orders)
        except FullError:
            raise ApiError(
                429, "too many requests are waiting", code="queue_full", retry_after=RETRY_SECONDS
            ) from None
        except StoppedError:
            raise ApiError(503, "the server is stopping", retry_after=RETRY_SECONDS) from None

    def cancel(self) -> None:
        self.engine.cancel(self._sequences)

    @property
    def counts(self) -> dict[str, int]:
        prompts = sum({id(order["prompt"]): len(order["prompt"]) for order in self.orders}.values())
        return {
            "prompt_tokens": prompts, "completion_tokens": self.new_tokens, "total_tokens": prompts + self.new_tokens,
        }  # fmt: skip

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """As they come, until every choice has ended; who leaves off earlier cancels. Raises ApiError where the engine
        failed."""
        writers = {index: Writer(self.texts, self.stops) for index in range(len(self.orders))}
        held: dict[int, list[Token]] = {index: [] for index in writers}
        while writers:
            index, events = await self._events.get()
            writer = writers.get(index)
            if writer is None:
                continue  # ended at a stop string before the engine knew
            tokens = [event for event in events if isinstance(event, Token)]
            answered = [token.id for token in tokens if not token.prompt]
            held[index] += tokens
            self.new_tokens += len(answered)
            text, finish = writer.add(*answered) if answered else "", None
            last = events[-1]
            if isinstance(last, Finished):
                if last.reason == "error":
                    raise ApiError(500, last.error)
                if last.reason == "refused":
                    raise ApiError(400, last.error, param="response_format")
                text, finish = text + writer.end(), _reason(last)
            if writer.stopped:
                finish = "stop"
            if finish:
                del writers[index]
                self.engine.cancel([self._sequences[index]])
            if text or finish:
                yield Piece(index, text, held[index], finish)
                held[index] = []


def _sender(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, list[Event]]], index: int, *, at_once: bool
) -> Callable[[Event], None]:
    """What the engine's thread calls with the events of choice `index`; unless `at_once`, they are sent at its end.

    It must not know the request, which holds the sequences that hold this: in a cycle an adapter would outlive its
    last answer until Python looks for cycles.
    """
    held: list[Event] = []

    def put(event: Event) -> None:
        held.append(event)
        if at_once or isinstance(event, Finished):
            sent = held.copy()
            held.clear()
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, (index, sent))

    return put


def _reason(event: Finished) -> str:
    return {"cancelled": "stop"}.get(event.reason, event.reason)


# ---- the bodies of OpenAI's answers ----


def chat_logprobs(texts: Texts, tokens: list[Token]) -> dict[str, Any]:
    """As in chat completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = texts.token(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**entry(token.id, token.logprob or 0.0), "top_logprobs": [entry(*top) for top in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def plain_logprobs(texts: Texts, tokens: list[Token], start: int) -> dict[str, Any]:
    """As in completions; `start` is where the text of the first token stands."""
    words = [texts.token(token.id) for token in tokens]
    offsets = [start]
    for word in words[:-1]:
        offsets.append(offsets[-1] + len(word))
    return {
        "tokens": words,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{texts.token(i): p for i, p in token.top} if token.top else None for token in tokens],
        "text_offset": offsets[: len(words)],
    }


def envelope(request: Request, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": request.id, "object": kind, "created": request.created, "model": request.name, "choices": choices,
    }  # fmt: skip
