"""Clients that lie, stall, flood and leave: each is told or dropped at once, and the others do not notice."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.serve import Adapters, Room, generate, protocol, start
from halfbyte.serve.text import Texts

httpx = pytest.importorskip("httpx")

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


def head(server: Any, path: str, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: {server.user['authorization']}", *headers]
    return "\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode()


def whole(server: Any, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return head(server, path, f"Content-Length: {len(content)}") + content


def connect(server: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def ask(server: Any, **fields: Any) -> Any:
    body = {"model": "a1", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0} | fields
    return httpx.post(server.url + COMPLETE, json=body, headers=server.user, timeout=30)


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


@contextmanager
def undisturbed(server: Any) -> Iterator[None]:
    """Whatever happens inside, a stream that is read meanwhile says what it says alone; nothing is held afterwards."""
    options = {"max_tokens": 90, "stream": True}
    expected = ask(server, **options).text.count("data:")
    found: list[int] = []
    reader = threading.Thread(target=lambda: found.append(ask(server, **options).text.count("data:")))
    reader.start()
    wait_for(lambda: server.engine.running)
    yield
    reader.join(30)
    assert found == [expected]
    wait_for(lambda: server.engine.running == server.engine.waiting == 0)
    assert server.engine.pool.in_use == 0
    assert httpx.get(server.url + "/health", headers=server.user).status_code == 200


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b'Content-Length: 500\r\n\r\n{"model"', b""),  # and then the end
        (b'Content-Length: 2\r\n\r\n{}{"more": 1}', b"HTTP/1.1 400 "),
        (b"Content-Length: -1\r\n\r\n{}", b"HTTP/1.1 400 "),
        (b"Content-Length: 1000000000000\r\n\r\n{}", b"HTTP/1.1 413 "),
        (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", b"HTTP/1.1 400 "),
        (b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n", b""),
        (b"Transfer-Encoding: chunked\r\n\r\n" + b"100000\r\n%b\r\n" % (b" " * 0x100000) * 9, b"HTTP/1.1 413 "),
        (b"X: " + b"x" * 200_000, b"HTTP/1.1 400 "),
    ],
)
def test_a_request_that_lies(server: Any, sent: bytes, said: bytes) -> None:
    with undisturbed(server), connect(server) as connection:
        start_line = head(server, CHAT).removesuffix(b"\r\n")
        try:
            connection.sendall(start_line + sent)
            with suppress(OSError):  # who has answered may be gone
                connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100)[: len(said)] == said
        except (BrokenPipeError, ConnectionResetError):
            assert said == b"HTTP/1.1 413 " or b"X: " in sent  # closed while we still sent


def test_a_prompt_of_one_character(server: Any) -> None:
    answer = ask(server, prompt="a" * 10**6)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_long_bodies_share_a_bound(server: Any) -> None:
    """No more is taken in of a second long one, short ones are answered; after the first there is room again."""
    content = json.dumps({"model": "base", "prompt": "a" * 1_900_000}).encode()
    posted = head(server, COMPLETE, f"Content-Length: {len(content)}")
    with undisturbed(server):
        with connect(server) as first, connect(server) as second:
            first.sendall(posted + content[:-1])
            wait_for(lambda: ask_with(server, content).status_code == 503)
            second.sendall(posted + content[:500_000])
            assert second.recv(200).startswith(b"HTTP/1.1 503 ")
            assert ask_with(server, content).headers["retry-after"] == "1"
            assert ask(server).status_code == 200
            first.sendall(content[-1:])
            assert first.recv(200).startswith(b"HTTP/1.1 400 ")  # as the next line: too long for this context
        wait_for(lambda: ask_with(server, content).status_code == 400)
    many = b'{"model": "base", "prompt": [%b]}' % b",".join([b"[]"] * 70_000)
    assert ask_with(server, many).json()["error"]["message"] == "the body may have 65536 brackets"


def ask_with(server: Any, content: bytes) -> Any:
    return httpx.post(
        server.url + COMPLETE, content=content, headers=server.user | {"content-type": "application/json"}, timeout=20
    )


def test_encoding_holds_nobody_up(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(self: Texts, text: str) -> list[int]:
        entered.set()
        leave.wait(20)
        return [5]

    monkeypatch.setattr(Texts, "plain", slow)
    asking = threading.Thread(target=ask, args=(server,), kwargs={"prompt": "x"})
    asking.start()
    assert entered.wait(20)
    assert httpx.get(server.url + "/health", headers=server.user, timeout=5).status_code == 200
    leave.set()
    asking.join()


def test_clients_leave_at_any_time(server: Any) -> None:
    """Before the first token, while tokens come, with FIN and with RST."""
    body = {"model": "a2", "prompt": [9, 8, 7], "max_tokens": 120, "temperature": 0}
    cases = [(stream, first, reset) for stream in (True, False) for first in (True, False) for reset in (True, False)]
    with undisturbed(server):
        for stream, first, reset in cases:
            with connect(server) as connection:
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(whole(server, COMPLETE, body | {"stream": stream}))
                if first and stream:
                    assert connection.recv(10)
                elif first:
                    wait_for(lambda: server.engine.running == 2 or server.engine.counts.finished["length"] > 1)
    assert server.engine.counts.finished["cancelled"] >= 4  # some end before they are missed


def test_a_client_that_reads_slowly_is_dropped(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it is bounded: the connection's buffer, the system's, and the tokens of its answers."""
    monkeypatch.setattr(generate, "SEND_SECONDS", 0.5)
    body = {"model": "a1", "messages": [{"role": "user", "content": "x"}], "max_tokens": 100, "n": 8, "stream": True,
            "logprobs": True, "top_logprobs": 20, "temperature": 1, "seed": 1}  # fmt: skip
    with undisturbed(server), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(whole(server, CHAT, body))
        received, until = 0, time.monotonic() + 2
        while time.monotonic() < until:  # a byte at a time
            received += len(connection.recv(1))
            time.sleep(0.05)
        wait_for(lambda: server.engine.running <= 1)
        try:
            while part := connection.recv(1 << 20):
                received += len(part)
        except ConnectionResetError:
            pass
        assert received < 1_000_000  # of 2.5 MB


def test_idle_connections_are_closed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "IDLE_SECONDS", 1)
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.3)
    server = request.getfixturevalue("server")
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(50)]
        kept = [stack.enter_context(connect(server)) for _ in range(20)]
        for connection in kept:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(9) == b"HTTP/1.1 "
        assert ask(server).status_code == 200
        for connection in silent + kept:
            while connection.recv(1 << 16):
                pass


def test_too_many_connections_are_refused_at_once(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", 40)
    with undisturbed(server), ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(30)]
        late = [stack.enter_context(connect(server)) for _ in range(200)]
        # Ten come in, or nine beside a connection that a test before has left; which ones depends on when that goes.
        wait_for(lambda: len(select.select(late, [], [], 0)[0]) >= 190)
        refused = select.select(late, [], [], 0)[0]
        answers = [b"".join(iter(partial(connection.recv, 1000), b"")) for connection in refused]
        assert all(answer.startswith(b"HTTP/1.1 503 ") and answer.endswith(b"}") for answer in answers)
        for connection in held:  # those who were there are served
            connection.sendall(whole(server, COMPLETE, {"model": "base", "prompt": [5], "max_tokens": 1}))
        assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in held)
    assert ask(server).status_code == 200


def test_a_thousand_orders_at_once(server: Any) -> None:
    """The queue takes what it has room for, in whole requests; the others are told at once, all accepted ones end."""
    expected = ask(server).json()["choices"]
    found: list[Any] = []

    def client() -> None:
        with httpx.Client(headers=server.user, timeout=30) as http:
            for _ in range(4):
                body = {"model": "a1", "prompt": [[5, 6, 7]] * 16, "max_tokens": 6, "temperature": 0}
                found.append(http.post(server.url + COMPLETE, json=body))

    with undisturbed(server):
        clients = [threading.Thread(target=client) for _ in range(16)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    answers = [answer.json()["choices"] for answer in found if answer.status_code == 200]
    refused = [answer for answer in found if answer.status_code == 429]
    assert len(answers) + len(refused) == 64
    assert answers
    assert refused
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    assert all(choice["text"] == expected[0]["text"] for choices in answers for choice in choices)


_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))


def test_no_name_opens_a_file(server: Any) -> None:
    """Whoever asks with whatever for a model or an adapter: nothing but the allowed folder is looked at."""
    global _opened
    names = ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f", "a/b", "a\0b", "CON", "x" * 10_000, "ａ1", "",
             ".", "..", "/etc/passwd", "file:///etc/passwd", "http://localhost/x", "a1/../a1", "~root", "$HOME",
             "a\nb"]  # fmt: skip
    sys.addaudithook(_audit)  # there is no way to take it away: it looks at a list that is None outside of this test
    _opened = []
    try:
        for name in names:
            assert ask(server, model=name).status_code in (400, 404)
            answer = httpx.post(server.url + "/admin/adapters", json={"name": name}, headers=server.admin)
            assert answer.status_code in (400, 413), name
            for path in (b"/v1/models/", b"/admin/adapters/"):
                quoted = b"".join(b"%%%02x" % byte for byte in name.encode())[:3000]
                for method in ("GET", "DELETE"):
                    target = httpx.URL(server.url, raw_path=path + quoted)
                    status = httpx.request(method, target, headers=server.admin).status_code
                    assert status in (400, 404, 405), (name, path, status)
        outside = [path for path in _opened if not path.startswith(str(server.folder))]
    finally:
        _opened = None
    assert outside == []


def test_an_adapter_that_does_not_fit_in_memory(
    server: Any, adapters: Adapters, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(9, server.folder / "a9")
    monkeypatch.setattr(adapters, "_room", Room(10_000, 4))
    with undisturbed(server):
        answer = httpx.post(server.url + "/admin/adapters", json={"name": "a9"}, headers=server.admin)
    assert answer.status_code == 507
    assert "--memory" in answer.json()["error"]["message"]
    assert ask(server, model="a9").status_code == 404


def test_the_server_ends_with_its_engine(decoder: Any, adapters: Adapters, tiny_tokenizer: Any) -> None:
    class Dies:
        num_blocks, context = decoder.num_blocks, decoder.context

        def run(self, ids: Any, rows: Any, wanted: Any) -> Any:
            raise SystemExit

    ended: list[BaseException] = []
    urls: list[str] = []
    listening = start.bind(start.Settings(port=0))
    texts = Texts(tiny_tokenizer, stops=[2], context=128)

    def run() -> None:
        try:
            start.serve(Dies(), adapters, texts, start.Settings(), listening, urls.append)
        except HalfbyteError as error:
            ended.append(error)

    server = threading.Thread(target=run)
    server.start()
    wait_for(lambda: urls)
    answer = httpx.post(urls[0] + COMPLETE, json={"model": "base", "prompt": [5]}, timeout=20)
    assert answer.status_code == 500
    server.join(20)
    assert not server.is_alive()
    assert [error.exit_code for error in ended if isinstance(error, HalfbyteError)] == [1]


def test_health_is_the_engines(server: Any) -> None:
    assert httpx.get(server.url + "/health", headers=server.user).status_code == 200
    server.engine.stop(5)
    assert httpx.get(server.url + "/health", headers=server.user).status_code == 503
    assert ask(server).status_code == 503
