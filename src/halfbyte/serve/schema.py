"""Every field that a client may send, with its bounds: the one place where a request is judged.

Types are strict ("5" is no number) and unknown fields are refused, each with the name of the field.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from halfbyte.config.plain_words import in_plain_words
from halfbyte.serve.adapters import NAME
from halfbyte.serve.errors import ApiError

MOST_CHARACTERS = 2_000_000
MOST_TOKENS = 1_000_000
MOST_LISTS = 65_536
"""And objects in a body: an empty one of two characters takes 80 bytes."""
MOST_SCHEMA_CHARACTERS, MOST_SCHEMA_DEPTH = 65_536, 64

Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Model = TypeVar("Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: Annotated[str, Field(max_length=64)] = ""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    include_usage: bool = False


class JsonSchema(_Strict):
    """A name for the client, and the schema, by which the answer is held."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=4096)] = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _bounded(cls, schema: dict[str, Any]) -> dict[str, Any]:
        level: list[Any] = [schema]
        for _ in range(MOST_SCHEMA_DEPTH):
            level = [
                inner
                for outer in level
                for inner in (outer.values() if isinstance(outer, dict) else outer)
                if isinstance(inner, dict | list)
            ]
        if level:
            raise ValueError(f"nested more than {MOST_SCHEMA_DEPTH} deep")
        if len(json.dumps(schema)) > MOST_SCHEMA_CHARACTERS:
            raise ValueError(f"more than {MOST_SCHEMA_CHARACTERS} characters")
        return schema


class ResponseFormat(_Strict):
    """Any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema comes with type json_schema, and only so")
        return self


class _Generation(_Strict):
    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=1024),
    ] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] = ""

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @model_validator(mode="after")
    def _together(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream")
        return self


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = MOST_TOKENS
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = MOST_TOKENS
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        return self


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: Text | TokenIds | Annotated[list[Text], Field(min_length=1, max_length=16)] | Annotated[
        list[TokenIds], Field(min_length=1, max_length=16)
    ]  # fmt: skip
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=16)] = 1

    @model_validator(mode="after")
    def _echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: at least 1 without echo")
        if self.best_of not in (1, self.n):
            raise ValueError("best_of: only what n says")
        if self.echo and self.stream:
            raise ValueError("echo: not with stream")
        return self


class LoadRequest(_Strict):
    """POST /admin/adapters."""

    name: Annotated[str, Field(pattern=NAME)]


def parse(body: bytes, model: type[Model]) -> Model:
    """A request's body. Raises ApiError, which names the field."""
    if body.count(b"[") + body.count(b"{") > MOST_LISTS:
        raise ApiError(413, f"the body may have {MOST_LISTS} brackets")
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_no_twice, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise _as_api_error(error) from None


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    message, parts = in_plain_words(first), [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        message += ": /openapi.json has the fields"
    if not parts and ": " in message:  # from a check of several fields
        parts, message = [message.partition(": ")[0]], message.partition(": ")[2]
    # Of a union, pydantic names the alternative too ("stop.list[...]"): the client knows fields and positions alone.
    named = [part for part in parts if part.replace("_", "").isalnum() and part not in ("str", "list")]
    param = ".".join(named)[:200] or None
    return ApiError(400, f"{param or 'the body'}: {message}"[:500], param=param)


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
