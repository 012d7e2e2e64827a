"""Answers held to JSON: they parse and fit their schema, and no schema holds up the server."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import pytest
import torch

from halfbyte.serve.sampling import Sampling

pytest.importorskip("llguidance")
httpx = pytest.importorskip("httpx")
jsonschema_rs = pytest.importorskip("jsonschema_rs")
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

CHAT = "/v1/chat/completions"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
}


def by(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def asked(text: str = "A cat?", **fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": text}], "max_tokens": 100} | fields


@pytest.fixture
def client(server: Any) -> Any:
    return openai.OpenAI(
        base_url=server.url + "/v1", api_key="user-key", max_retries=0, _strict_response_validation=True
    )


def post(server: Any, **fields: Any) -> Any:
    return httpx.post(server.url + CHAT, json=asked(**fields), headers=server.user, timeout=30)


def test_answers_fit_their_schema(client: Any) -> None:
    names, ended = ["base", "a1", "a2"], 0
    for number in range(17):
        created = client.chat.completions.create(
            **asked(f"Animal {number}", model=names[number % 3], n=3, seed=number), response_format=by(SCHEMA)
        )
        for choice in created.choices:
            if choice.finish_reason == "stop":
                ended += 1
                jsonschema_rs.validate(SCHEMA, json.loads(choice.message.content))
    assert ended > 40  # measured 51 of 51: a random model may also fill its 100 tokens with blanks


def test_parse_stream_stop_and_length(client: Any) -> None:
    class Animal(pydantic.BaseModel):
        kind: str = pydantic.Field(max_length=3)
        age: int = pydantic.Field(ge=0, le=9)

    parsed = client.chat.completions.parse(**asked(seed=1), response_format=Animal).choices[0].message.parsed
    assert isinstance(parsed, Animal)
    options = asked(seed=2, temperature=0.7, response_format=by(SCHEMA))
    whole = client.chat.completions.create(**options).choices[0]
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    stopped = client.chat.completions.create(**options, stop='"kind').choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == whole.message.content.partition('"kind')[0]
    cut = client.chat.completions.create(**options | {"max_tokens": 3}).choices[0]
    assert cut.finish_reason == "length"
    assert whole.message.content.startswith(cut.message.content)


def test_any_object(client: Any) -> None:
    found = client.chat.completions.create(
        **asked(max_tokens=60, temperature=0), response_format={"type": "json_object"}
    )
    text = found.choices[0].message.content
    assert text.startswith("{")
    if found.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_others_do_not_notice(ask: Any, client: Any) -> None:
    prompt = [5, 40, 41, 42, 43]
    alone = ask("base", prompt, max_tokens=60, logprobs=2)
    alone.ids  # noqa: B018  (waits)
    beside = ask("base", prompt, max_tokens=60, logprobs=2)
    client.chat.completions.create(**asked(n=4, seed=1), response_format=by(SCHEMA))
    assert beside.ids  # waits
    assert alone.events == beside.events


class DeadEnd:
    """A form that leaves nothing after two tokens."""

    def __init__(self) -> None:
        self.taken = 0

    def allowed(self) -> torch.Tensor:
        return torch.full((400,), self.taken < 2)

    def took(self, token: int) -> None:
        self.taken += 1


def test_a_dead_end_ends_one_answer(ask: Any) -> None:
    prompt = [5, 40, 41, 42, 43]
    alone = ask("a1", prompt).ids
    refused, beside = ask("base", prompt, sampling=Sampling(form=DeadEnd)), ask("a1", prompt)
    assert len(refused.ids) == 2
    assert refused.reason == "refused"
    assert "no token may follow" in refused.events[-1].error
    assert beside.ids == alone


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1200)} | {"d1200": {"type": "string"}}
HOSTILE: dict[str, Any] = {
    "nested": nested(100),
    "large": {"enum": ["x" * 100] * 1000},
    "no schema": {"type": "nothing"},
    "no keyword": {"type": "object", "unevaluatedProperties": False, "dependentRequired": {}},
    "outside": {"$ref": "https://example.com/schema.json"},
    "nobody": {"$ref": "#/$defs/nobody"},
    "itself": {"$ref": "#"},
    "each other": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "impossible": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "pattern": {"type": "string", "pattern": "("},
    "look ahead": {"type": "string", "pattern": "^(?=a)b"},
    "all of": {"allOf": [{"anyOf": [{"pattern": f"a{i}"}, {"pattern": f"b{i}"}]} for i in range(30)]},
    "patterns": {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}"} for i in range(10, 40)]},  # for ever
}
"""Each of these is refused."""
STRANGE: dict[str, Any] = {
    "bomb": {"type": "string", "pattern": "(((a{1,100}){1,100}){1,100}){1,100}"},
    "bomb 2": {"type": "string", "pattern": "^(.*a.{30}|.*b.{31}|.*c.{29})+$"},
    "long": {"type": "string", "minLength": 10**9},
    "many": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
    "chain": {"$ref": "#/$defs/d0", "$defs": CHAIN},
    "recursive": {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
    "blow up": {"type": "string", "pattern": "^(a|a)*(a|a)*(a|a)*(a|a)*b$"},
    "optional": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(800)}},
    "any of": {"anyOf": [{"type": "object", "properties": {f"p{i}": {"pattern": "(x+x+)+y"}}} for i in range(300)]},
}
"""These may also be served, or end an answer."""


@pytest.mark.parametrize("name", [*HOSTILE, *STRANGE])
def test_hostile_schemas(server: Any, name: str) -> None:
    slowest, done = 0.0, threading.Event()

    def watch() -> None:  # the event loop answers meanwhile
        nonlocal slowest
        while not done.is_set():
            started = time.monotonic()
            assert httpx.get(server.url + "/health", headers=server.user, timeout=30).status_code == 200
            slowest = max(slowest, time.monotonic() - started)

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.monotonic()
    answer = post(server, response_format=by(HOSTILE.get(name) or STRANGE[name]), max_tokens=20)
    took = time.monotonic() - started
    done.set()
    watching.join()
    assert answer.status_code == 400 or (name in STRANGE and answer.status_code == 200), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["param"].startswith("response_format"), answer.text
    assert took < 10
    assert slowest < 2


def test_bad_formats_are_named(server: Any) -> None:
    cases = [
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format"),
        ({"type": "json_object", "json_schema": {"name": "x", "schema": {}}}, "response_format"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": []}}, "response_format.json_schema.schema"),
        (by({"enum": ["x" * 70_000]}), "response_format.json_schema.schema"),
    ]
    for given, param in cases:
        answer = post(server, response_format=given)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_without_the_library(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = post(server, response_format={"type": "json_object"})
    assert answer.status_code == 400
    assert 'pip install "halfbyte[serve]"' in answer.json()["error"]["message"]
