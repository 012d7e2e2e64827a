"""The HTTP interface over a real socket: OpenAI's own client, bad requests, keys, adapters, clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "What follows 3?"}]


@pytest.fixture
def client(server: Any) -> Any:
    return openai.OpenAI(
        base_url=server.url + "/v1", api_key="user-key", max_retries=0, _strict_response_validation=True
    )


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": HELLO, "max_tokens": 8, "temperature": 0} | fields


def post(server: Any, path: str, body: Any, **options: Any) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"content-type": "application/json", **server.user} | options.pop("headers", {})
    return httpx.post(server.url + path, content=content, headers=headers, timeout=30, **options)


def test_openai_client(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["base", "a1", "a2", "a3"]
    answers = {}
    for name in ("base", "a1"):
        whole = client.chat.completions.create(**chat(model=name))
        streamed = list(client.chat.completions.create(**chat(model=name), stream=True,
                                                       stream_options={"include_usage": True}))  # fmt: skip
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
        assert text == whole.choices[0].message.content
        assert streamed[-1].usage == whole.usage
        assert whole.usage.completion_tokens == 8
        assert whole.choices[0].finish_reason == "length"
        answers[name] = text
    assert answers["base"] != answers["a1"]
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.chat.completions.create(**chat(model="nobody"))


def test_openai_async_client(server: Any) -> None:
    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key="user-key", max_retries=0, _strict_response_validation=True
        )
        names = ["base", "a1", "a2", "a3"] * 3
        found = await asyncio.gather(*(client.chat.completions.create(**chat(model=name)) for name in names))
        stream = await client.chat.completions.create(**chat(model="a2"), stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        await client.close()
        return [answer.choices[0].message.content for answer in found] + [text]

    texts = asyncio.run(ask())
    assert texts[:4] == texts[4:8] == texts[8:12]
    assert texts[12] == texts[2]


def test_completions_with_echo_and_logprobs(server: Any, client: Any) -> None:
    ids = [5, 40, 41, 42, 43]
    options = {"model": "a1", "prompt": ids, "max_tokens": 4, "temperature": 0, "logprobs": 2}
    plain = client.completions.create(**options).choices[0]
    # As OpenAI's own answer the first token's is null, which the client's strict types do not know.
    lax = openai.OpenAI(base_url=server.url + "/v1", api_key="user-key", max_retries=0)
    echoed = lax.completions.create(**options, echo=True).choices[0]
    assert echoed.text.endswith(plain.text)
    assert len(plain.logprobs.tokens) == 4
    assert len(echoed.logprobs.tokens) == 9
    assert echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.token_logprobs[5:] == plain.logprobs.token_logprobs
    assert all(max(top.values()) >= p for top, p in zip(plain.logprobs.top_logprobs, plain.logprobs.token_logprobs,
                                                        strict=True))  # fmt: skip
    scored = lax.completions.create(**options | {"max_tokens": 0}, echo=True).choices[0]
    assert scored.logprobs.token_logprobs == echoed.logprobs.token_logprobs[:5]


def test_seeds_choices_and_stops(client: Any) -> None:
    asked = chat(temperature=1.5, seed=7, n=3, max_tokens=12)
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    whole = client.chat.completions.create(**chat(max_tokens=16)).choices[0].message.content
    stop = whole[4:6]
    cut = client.chat.completions.create(**chat(max_tokens=16), stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


LONG = 2**80
BAD: list[tuple[dict[str, Any], str]] = [
    *(({"max_tokens": value}, "max_tokens") for value in (0, -1, 10**12, "5", 1.5, None)),
    *(({"n": value}, "n") for value in (0, 17, True, "1")),
    *(({"temperature": value}, "temperature") for value in (-0.1, 2.1, "hot")),
    *(({"top_p": value}, "top_p") for value in (0, 2)),
    ({"top_k": -1}, "top_k"), ({"min_p": 1.5}, "min_p"), ({"seed": LONG}, "seed"),
    ({"presence_penalty": 1e9}, "presence_penalty"), ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"), ({"stop": ["a"] * 5}, "stop"), ({"stop": ""}, "stop"),
    ({"top_logprobs": 5}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "king", "content": ""}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages"), ({"best_of": 1}, "best_of"),
    ({"response_format": {"type": "xml"}}, "response_format.type"), ({"model": ""}, "model"),
    ({"max_tokens": 128}, "messages"),
]  # fmt: skip


def test_a_bad_field_is_named(server: Any) -> None:
    for fields, param in BAD:
        answer = post(server, CHAT, chat(**fields))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (fields, answer.text)
    for prompt in ([], "", [400], [-1], [[5], []], list(range(3, 200))):
        answer = post(server, "/v1/completions", {"model": "base", "prompt": prompt})
        assert answer.status_code == 400, prompt
        assert answer.json()["error"]["param"].split(".")[0] == "prompt", answer.text
    assert server.engine.counts.steps == 0  # nothing of this has reached the engine


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"\xff\xfe", 400), (b"{", 400), (b"[]", 400), (b'{"model": "a", "model": "b"}', 400),
        (b'{"temperature": NaN}', 400), (b"[" * 5000, 400), (b'{"messages": "\\ud800"}', 400), (b" " * 9_000_000, 413),
    ],
)  # fmt: skip
def test_a_bad_body_is_refused(server: Any, body: bytes, status: int) -> None:
    answer = post(server, CHAT, body)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_types_and_encodings_are_refused(server: Any) -> None:
    assert post(server, CHAT, chat(), headers={"content-type": "text/plain"}).status_code == 415
    assert post(server, CHAT, chat(), headers={"content-encoding": "gzip"}).status_code == 415


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "TRACE", "DELETE"])
def test_keys(server: Any, method: str) -> None:
    def status(path: str, **headers: str) -> int:
        target = httpx.URL(server.url, raw_path=path.encode())
        return int(httpx.request(method, target, headers=headers).status_code)

    for path in (CHAT, "/v1/models", "/health", "/metrics", "/openapi.json", "/nothing", "/v1/"):
        assert status(path) == 401
        assert status(path, authorization="Bearer user-kez") == 401
    for path in ("/admin/adapters", "//v1//admin", "/V1/models", "/v1/models;x", "/%61dmin/adapters", "/v1//models"):
        assert status(path) == 401
        assert status(path, **server.user) == 403
    assert status("/v1/models", **server.user, host="evil.example") == 421
    assert status("/v1/models", **server.user) == {"GET": 200, "HEAD": 200}.get(method, 405)


def test_adapters_come_and_go(server: Any, make_adapter: Any) -> None:
    make_adapter(9, server.folder / "a9")
    make_adapter(4, server.folder / "other", base_sha256="0" * 64)
    (server.folder / "broken").mkdir()
    (server.folder / "broken" / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    (server.folder / "linked").symlink_to(server.folder / "a9")

    def load(name: Any) -> Any:
        return post(server, "/admin/adapters", {"name": name}, headers=server.admin)

    for name in ("other", "broken", "linked", "missing", "base"):
        answer = load(name)
        assert answer.status_code == 400, name
        assert post(server, CHAT, chat(model=name)).status_code == (200 if name == "base" else 404)
    for name in ("../../etc/passwd", "%2e%2e%2f", "a/b", "a\0b", "", "x" * 10_000, "ａ9", "..", 5, None):
        assert load(name).status_code in (400, 413)
    assert post(server, CHAT, chat(model="a9")).status_code == 404
    assert load("a9").status_code == 200
    first = post(server, CHAT, chat(model="a9")).json()["choices"]
    with httpx.stream(
        "POST", server.url + CHAT, json=chat(model="a9", max_tokens=60, stream=True), headers=server.user, timeout=30
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        gone = httpx.delete(server.url + "/admin/adapters/a9", headers=server.admin)
        assert gone.status_code == 200
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text.startswith(first[0]["message"]["content"])
    assert post(server, CHAT, chat(model="a9")).status_code == 404
    assert httpx.delete(server.url + "/admin/adapters/base", headers=server.admin).status_code == 404
    assert load("a9").status_code == 200
    assert post(server, CHAT, chat(model="a9")).json()["choices"] == first


def test_a_client_that_leaves_is_forgotten(server: Any) -> None:
    for stream in (True, False):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            body = json.dumps(chat(max_tokens=100, stream=stream)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer user-key\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            wait_for(lambda: server.engine.running == 1)
        wait_for(lambda: server.engine.running == 0)
    assert server.engine.counts.finished["cancelled"] == 2
    assert server.engine.pool.in_use == 0


def test_a_slow_client_is_closed(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.serve import protocol

    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /health HT")
        connection.settimeout(10)
        started = time.monotonic()
        assert connection.recv(100) == b""
        assert time.monotonic() - started < 5
    assert httpx.get(server.url + "/health", headers=server.user).json()["status"] == "ok"


def test_a_slow_body_is_refused(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.serve import bodies

    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer user-key\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
        connection.settimeout(10)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_full_queue_is_said_at_once(server: Any) -> None:
    answer = post(server, "/v1/completions", {"model": "base", "prompt": [[5]] * 16, "n": 16})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"


def test_page_metrics_ids_and_log(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "halfbyte.serve")
    page = httpx.get(server.url + "/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text  # no outside assets
    post(server, CHAT, chat(model="x\nINFO forged \x1b[31m"), headers={"x-request-id": "mine-1"})
    answer = post(server, CHAT, chat(), headers={"x-request-id": "a b"})
    assert len(answer.headers["x-request-id"]) == 32
    metrics = httpx.get(server.url + "/metrics", headers=server.user).text
    assert 'halfbyte_answers_total{reason="length"} 1' in metrics
    assert "halfbyte_cache_blocks_in_use 0" in metrics
    assert "mine-1 POST" in caplog.text
    assert "forged" not in caplog.text
    assert "user-key" not in caplog.text


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)
