"""/v1/chat/completions and /v1/completions: from a judged request to the answer, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import secrets
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable
from collections.abc import Sequence as Tokens
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from halfbyte.serve.adapters import Adapters
from halfbyte.serve.answer import Piece, Request, chat_logprobs, envelope, plain_logprobs
from halfbyte.serve.bodies import Bodies
from halfbyte.serve.engine import Engine
from halfbyte.serve.errors import ApiError
from halfbyte.serve.grammar import Grammars
from halfbyte.serve.guard import Receive, Scope, Send
from halfbyte.serve.sampling import MakeForm, Sampling
from halfbyte.serve.schema import ChatRequest, CompletionRequest, parse
from halfbyte.serve.sequence import Token
from halfbyte.serve.text import Texts

SEND_SECONDS = 30.0
"""A client that takes in nothing for so long is dropped."""


class Generation:
    """The two endpoints over one engine."""

    def __init__(self, engine: Engine, adapters: Adapters, texts: Texts, bodies: Bodies) -> None:
        self._engine, self._adapters, self._texts, self._bodies = engine, adapters, texts, bodies
        self._grammars = Grammars(texts)

    async def chat(self, http: HttpRequest) -> Response:
        async with self._bodies.read(http) as body:
            request = await self._chat(body)
        return await _respond(http, request)

    async def complete(self, http: HttpRequest) -> Response:
        async with self._bodies.read(http) as body:
            request = await self._completion(body)
        return await _respond(http, request)

    async def _chat(self, body: bytes) -> Request:
        asked = parse(body, ChatRequest)
        served = self._served(asked.model)
        # Newer clients call the system's role the developer's; templates know the old name.
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in asked.messages
        ]
        prompt = await asyncio.to_thread(self._texts.chat, messages)
        most = min(asked.max_tokens, asked.max_completion_tokens)
        logprobs = asked.top_logprobs if asked.logprobs else None
        form = await self._grammars.form(asked.response_format)
        return self._request(asked, self._orders(asked, served, [prompt], most, form, logprobs=logprobs), chat=True)

    async def _completion(self, body: bytes) -> Request:
        asked = parse(body, CompletionRequest)
        served = self._served(asked.model)
        prompts = [await self._prompt(prompt) for prompt in _as_list(asked.prompt)]
        tell = asked.echo and asked.logprobs is not None
        orders = self._orders(
            asked, served, prompts, asked.max_tokens, None, logprobs=asked.logprobs, prompt_logprobs=tell
        )
        return self._request(asked, orders, chat=False, echo=asked.echo)

    def _request(
        self, asked: ChatRequest | CompletionRequest, orders: list[dict[str, Any]], *, chat: bool, echo: bool = False
    ) -> Request:
        """What is left of `asked` while its answers are written: not its texts."""
        return Request(
            self._engine, self._texts, orders, asked.stops, chat, asked.model, in_pieces=asked.stream, echo=echo,
            usage=asked.stream_options is not None and asked.stream_options.include_usage,
        )  # fmt: skip

    def _served(self, name: str) -> Any:
        served = self._adapters.find(name)
        if served is None:
            raise ApiError(404, "no such model: see /v1/models", param="model", code="model_not_found")
        return served

    async def _prompt(self, prompt: str | list[int]) -> Tokens[int]:
        ids = await asyncio.to_thread(self._texts.plain, prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, "prompt: it has no tokens", param="prompt")
        if max(ids) >= self._texts.vocab_size:
            raise ApiError(400, f"prompt: token ids end at {self._texts.vocab_size - 1}", param="prompt")
        return ids

    def _orders(
        self, asked: ChatRequest | CompletionRequest, served: Any, prompts: list[Tokens[int]], most: int,
        form: MakeForm | None, **options: Any,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """One for each choice. Raises ApiError where a prompt does not fit the context."""
        context = self._texts.context
        given = "max_tokens" in asked.model_fields_set or "max_completion_tokens" in asked.model_fields_set
        for prompt in prompts:
            if len(prompt) + (most if given else 1) > context:
                wanted = f" and {most} new ones" if given else ""
                raise ApiError(
                    400, f"{len(prompt)} tokens of prompt{wanted} do not fit a context of {context}",
                    param="messages" if isinstance(asked, ChatRequest) else "prompt", code="context_length_exceeded",
                )  # fmt: skip
        prompts = [array("i", prompt) for prompt in prompts]
        seed = asked.seed if asked.seed is not None else secrets.randbits(63)
        bias = {int(token): value for token, value in asked.logit_bias.items()}
        if any(token >= self._texts.vocab_size for token in bias):
            raise ApiError(400, f"logit_bias: token ids end at {self._texts.vocab_size - 1}", param="logit_bias")
        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        chosen = {name: getattr(asked, name) for name in names}
        return [
            {
                "served": served, "prompt": prompt, "max_tokens": min(most, context - len(prompt)),
                "sampling": Sampling(**chosen, bias=bias, seed=(seed + choice) % 2**63, form=form),
                "stops": self._texts.stops, **options,
            }
            for prompt in prompts
            for choice in range(asked.n)
        ]  # fmt: skip


async def _respond(http: HttpRequest, request: Request) -> Response:
    request.start()
    if request.in_pieces:
        return EventStream(_stream(request), request.cancel)
    try:
        return await _while_connected(http, _whole(request))
    finally:
        request.cancel()


async def _whole(request: Request) -> Response:
    texts = [""] * len(request.orders)
    tokens: list[list[Token]] = [[] for _ in request.orders]
    finishes: list[str | None] = [None] * len(request.orders)
    async for piece in request.pieces():
        texts[piece.index] += piece.text
        tokens[piece.index] += piece.tokens
        finishes[piece.index] = piece.finish
    choices = []
    for index, order in enumerate(request.orders):
        choice: dict[str, Any] = {"index": index, "finish_reason": finishes[index], "logprobs": None}
        told = order["logprobs"] is not None
        if request.chat:
            choice["message"] = {"role": "assistant", "content": texts[index], "refusal": None}
            if told:
                choice["logprobs"] = chat_logprobs(request.texts, tokens[index])
        else:
            choice["text"] = (request.texts.decode(order["prompt"]) if request.echo else "") + texts[index]
            if told:
                first = [Token(order["prompt"][0], prompt=True)] if request.echo else []
                choice["logprobs"] = plain_logprobs(request.texts, first + tokens[index], 0)
        choices.append(choice)
    kind = "chat.completion" if request.chat else "text_completion"
    return JSONResponse({**envelope(request, kind, choices), "usage": request.counts})


async def _stream(request: Request) -> AsyncGenerator[dict[str, Any], None]:
    kind = "chat.completion.chunk" if request.chat else "text_completion"
    ends = {"usage": None} if request.usage else {}
    if request.chat:
        for index in range(len(request.orders)):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}
            yield {**envelope(request, kind, [choice]), **ends}
    offsets = [0] * len(request.orders)
    async with aclosing(request.pieces()) as pieces:
        async for piece in pieces:
            yield {**envelope(request, kind, [_chunk(request, piece, offsets)]), **ends}
    if request.usage:
        yield {**envelope(request, kind, []), "usage": request.counts}


def _chunk(request: Request, piece: Piece, offsets: list[int]) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish, "logprobs": None}
    told = request.orders[piece.index]["logprobs"] is not None and piece.tokens
    if request.chat:
        choice["delta"] = {"content": piece.text} if piece.text else {}
        if told:
            choice["logprobs"] = chat_logprobs(request.texts, piece.tokens)
    else:
        choice["text"] = piece.text
        if told:
            choice["logprobs"] = plain_logprobs(request.texts, piece.tokens, offsets[piece.index])
    offsets[piece.index] += len(piece.text)
    return choice


class EventStream(Response):
    """Server-sent events, which end when the client leaves or stops reading; then `ended` is called."""

    media_type = "text/event-stream"

    def __init__(self, objects: AsyncGenerator[dict[str, Any], None], ended: Callable[[], None]) -> None:
        super().__init__()
        self._ended = ended
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self._objects = objects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait([pump, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ended()
            for task in (pump, gone):
                task.cancel()
            await asyncio.gather(pump, gone, return_exceptions=True)

    async def _pump(self, send: Send) -> None:
        async def event(text: str) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._objects) as objects:
                async for found in objects:
                    await event(json.dumps(found))
        except ApiError as error:
            await event(json.dumps(error.body))
        await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _while_connected(http: HttpRequest, work: Awaitable[Response]) -> Response:
    """`work`, cancelled when the client leaves."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(http.receive))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=499)
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def _as_list(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)  # type: ignore[arg-type]
