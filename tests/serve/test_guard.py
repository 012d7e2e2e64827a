"""Keys: who is let in is decided by one comparison of constant time, whatever path is asked for."""

from __future__ import annotations

import hmac
import itertools
from typing import Any

import pytest

from halfbyte.serve import guard

httpx = pytest.importorskip("httpx")


def test_keys_are_compared_in_constant_time(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every path, known or not, `hmac.compare_digest` of digests decides, as often whatever is sent."""
    asked: list[tuple[bytes, bytes]] = []
    says = hmac.compare_digest

    def compare(given: bytes, key: bytes) -> bool:
        asked.append((given, key))
        return says(given, key)

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    paths = ("/v1/models", "/v1/chat/completions", "/metrics", "/health", "/admin/adapters", "/v1//models",
             "/V1/models", "/nothing", "/v1/models;x", "/v1/%6dodels", "/openapi.json")  # fmt: skip
    sent = (None, "u", "user-kez", "user-key", "admin-key", "x" * 5000, "\xff")
    methods = ("GET", "POST", "TRACE")
    with httpx.Client(base_url=server.url) as client:
        for path, key, method in itertools.product(paths, sent, methods):
            asked.clear()
            headers = {} if key is None else {"authorization": b"Bearer " + key.encode("latin-1")}
            refused = client.request(method, path, headers=headers).status_code == 401
            assert len(asked) == 2  # the user's key and the admin's
            assert {(type(each), len(each)) for pair in asked for each in pair} == {(bytes, 32)}
            assert refused == (key not in ("user-key", "admin-key")), (path, key, method)
        says = lambda given, key: False  # noqa: E731
        assert client.get("/v1/models", headers=server.user).status_code == 401
        says = lambda given, key: True  # noqa: E731
        assert client.get("/v1/models", headers={"authorization": "Bearer anything"}).status_code == 200
