"""What every request passes before anything of it is read: its id, its Host, its key.

Default deny: what is not named here needs the admin's key. The decision is made on the raw path, byte by byte, so that
no other spelling of a path gets another answer.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from halfbyte.report import LOOPBACK
from halfbyte.serve.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("halfbyte.serve")
OPEN = frozenset({b"/"})
"""The chat page: it holds nothing, and a browser sends no key for it."""
FOR_USERS = frozenset({b"/health", b"/metrics", b"/openapi.json"})
_FOR_USERS_BELOW = re.compile(rb"/v1/[A-Za-z0-9._/-]+")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


@dataclass(frozen=True)
class Keys:
    """None: for `user`, everybody may; for `admin`, nobody."""

    user: str | None
    admin: str | None


class Guard:
    """ASGI middleware.

    Args:
        local_only: the server listens on loopback alone: another Host means a web page that found its way here.
    """

    def __init__(self, app: App, keys: Keys, *, local_only: bool) -> None:
        self._app, self._local_only = app, local_only
        self._user, self._admin = (_digest(key) if key else None for key in (keys.user, keys.admin))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        status, started = 0, time.monotonic()

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            try:
                self._judge(scope, headers)
            except ApiError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        finally:
            path = scope.get("raw_path", b"")[:200]
            log.info("%s %s %r %d %.3fs", request_id, scope["method"][:16], path, status, time.monotonic() - started)

    def _judge(self, scope: Scope, headers: dict[bytes, str]) -> None:
        """Raises ApiError where the request may not go on."""
        if self._local_only and not LOOPBACK.match(headers.get(b"host", "")):
            raise ApiError(421, "this server answers on loopback: no such host here")
        path = scope.get("raw_path") or scope["path"].encode()
        if path in OPEN:
            return
        for_users = path in FOR_USERS or (_FOR_USERS_BELOW.fullmatch(path) is not None and b"//" not in path)
        given = _digest(headers.get(b"authorization", "").removeprefix("Bearer "))
        is_user = self._user is None or hmac.compare_digest(given, self._user)
        is_admin = self._admin is not None and hmac.compare_digest(given, self._admin)
        if is_admin or (for_users and is_user):
            return
        if b"authorization" not in headers or not (is_user and self._user is not None):
            raise ApiError(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        raise ApiError(403, "this needs the admin's key")


def _digest(key: str) -> bytes:
    """Of one length, so that comparing takes the same time for every key."""
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()
