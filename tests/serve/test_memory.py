"""What requests and adapters leave behind: nothing, and without the garbage collector; what has no room is refused."""

from __future__ import annotations

import gc
import json
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import ResourceError
from halfbyte.serve import Adapters, Room

httpx = pytest.importorskip("httpx")

CHAT = "/v1/chat/completions"


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No collection of cycles meanwhile."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def traffic(server: Any, model: str) -> None:
    """Requests of every kind, of which some fail and some are left."""
    messages = [{"role": "user", "content": "What follows 3?"}]
    body = {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0.5}
    with httpx.Client(base_url=server.url, headers=server.user, timeout=30) as client:
        for more in ({}, {"n": 3}, {"stop": ["a"]}, {"logprobs": True, "top_logprobs": 2}, {"top_p": 2},
                     {"stream": True}, {"stream": True, "stop": ["e"]}, {"max_tokens": 10**5}):  # fmt: skip
            client.post(CHAT, json=body | more)
        client.post("/v1/completions", json={"model": model, "prompt": [[5]] * 16, "n": 16})  # 429
        client.post("/v1/completions", json={"model": model, "prompt": [5, 6], "echo": True, "logprobs": 1})
    for stream in (True, False):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            content = json.dumps(body | {"max_tokens": 90, "stream": stream}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {server.user['authorization']}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            time.sleep(0.02)


@pytest.mark.usefixtures("uncollected")
def test_unloaded_adapters_go_with_their_last_answer(server: Any, adapters: Adapters, make_adapter: Any) -> None:
    """By reference counts: what waits for the collector of cycles is 20 MB each time in a real server."""
    make_adapter(9, server.folder / "a9")
    loaded = []
    for _ in range(3):
        with httpx.Client(base_url=server.url, headers=server.admin, timeout=30) as admin:
            admin.post("/admin/adapters", json={"name": "a9"}).raise_for_status()
            admin.post("/admin/adapters", json={"name": "a9"}).raise_for_status()  # in its own place
            served = adapters.find("a9")
            assert served is not None
            loaded += [weakref.ref(served), weakref.ref(served.adapter)]
            del served
            users = [threading.Thread(target=traffic, args=(server, "a9")) for _ in range(3)]
            for user in users:
                user.start()
            time.sleep(0.1)
            admin.delete("/admin/adapters/a9").raise_for_status()
            for user in users:
                user.join()
    until = time.monotonic() + 5
    while any(alive() is not None for alive in loaded) and time.monotonic() < until:
        time.sleep(0.01)
    held = [alive() for alive in loaded if alive() is not None]
    assert held == [], [gc.get_referrers(each) for each in held]
    assert server.engine.pool.in_use == 0


@pytest.mark.slow
def test_a_thousand_loads_under_traffic(server: Any, adapters: Adapters, make_adapter: Any) -> None:
    """Two versions of an adapter take turns under one name: every answer is one of theirs, and neither stays."""
    folders = [make_adapter(seed, server.folder / f"v{seed}") for seed in (7, 8)]
    body = {"model": "turns", "prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0}

    def ask(client: Any) -> str | None:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code in (200, 404), answer.text
        return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else None

    expected, found, going = [], list[str | None](), True
    with httpx.Client(base_url=server.url, headers=server.user, timeout=30) as client:
        for folder in folders:
            adapters.load("turns", folder)
            expected.append(ask(client))
    assert expected[0] != expected[1]

    def user() -> None:
        with httpx.Client(base_url=server.url, headers=server.user, timeout=30) as client:
            while going:
                found.append(ask(client))

    users = [threading.Thread(target=user) for _ in range(4)]
    for thread in users:
        thread.start()
    for number in range(1000):
        adapters.load("turns", folders[number % 2])
        if number % 3 == 0:
            adapters.unload("turns")
    going = False
    for thread in users:
        thread.join()
    assert {*found} <= {*expected, None}
    assert {*expected} <= {*found}
    adapters.unload("turns")
    until = time.monotonic() + 5
    while adapters.nbytes > 3 * adapters._in_memory[0][1]:  # those of the fixture
        assert time.monotonic() < until
        time.sleep(0.01)
    assert server.engine.pool.in_use == 0


def test_an_adapter_without_room_is_refused(adapters: Adapters, make_adapter: Any, tmp_path: Path) -> None:
    folder = make_adapter(4)
    served = adapters.find("a1")
    assert served is not None
    assert served.adapter is not None
    size, file = served.adapter.nbytes, (folder / "adapter_model.safetensors").stat().st_size
    small = Adapters("base", lay_out=adapters._lay_out, check=adapters._check, room=Room(2 * size + file, 4))
    small.load("one", folder)
    small.load("two", folder)
    assert small.nbytes == 2 * size
    with pytest.raises(ResourceError, match=r"while it is read, .* are free"):
        small.load("three", folder)
    kept = small.find("one")
    small.unload("one")
    with pytest.raises(ResourceError):  # a request has it still
        small.load("three", folder)
    del kept
    small.load("three", folder)
    assert [served.name for served in small.all()] == ["base", "two", "three"]
