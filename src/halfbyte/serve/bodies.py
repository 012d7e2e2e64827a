"""Reading bodies: each within a bound and a deadline, and all of them together within a share of the memory plan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from halfbyte.serve.errors import ApiError

BODY_BYTES = 2 * 2**20
CONTEXT_BYTES = 64
"""A body may have so many for each token of the context, where that is more."""
BODY_SECONDS = 20.0
SMALL_BYTES = 4096
"""Of each body are read whatever else is there: who sends little is never refused for those who send much."""


class Bodies:
    """Bodies of all connections.

    Args:
        most: bytes of one; and of all at once, beyond `SMALL_BYTES` of each.
    """

    def __init__(self, most: int = BODY_BYTES) -> None:
        self.most, self._held = most, 0

    @asynccontextmanager
    async def read(self, request: Request, *, most: int | None = None) -> AsyncGenerator[bytes]:
        """A JSON body, which counts until the caller is done with what it made of it.

        Raises:
            ApiError: too long, too slow, another type, or no room beside the others.
        """
        most = self.most if most is None else most
        _check_headers(request, most)
        body, counted = bytearray(), 0
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for part in request.stream():
                        body += part
                        if len(body) > most:
                            raise ApiError(413, f"the body may have {most} bytes")
                        more = max(len(body) - SMALL_BYTES, 0) - counted
                        if more and self._held + more > self.most:
                            raise ApiError(503, "too many long bodies at once", retry_after=1)
                        counted, self._held = counted + more, self._held + more
            except TimeoutError:
                raise ApiError(408, f"the body took longer than {BODY_SECONDS:g} s") from None
            except ClientDisconnect:
                raise ApiError(400, "the body ended early") from None
            yield bytes(body)
        finally:
            self._held -= counted


def _check_headers(request: Request, most: int) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form that a foreign web page sends cannot have it
        raise ApiError(415, "Content-Type must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Content-Encoding is not supported")
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or len(length) > 12 or int(length) > most:
        raise ApiError(413, f"the body may have {most} bytes")
