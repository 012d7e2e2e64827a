"""Errors of the HTTP interface, in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip


class ApiError(Exception):
    """What a client is told.

    Args:
        param: the field of the request that it concerns.
        code: for programs: "model_not_found", "context_length_exceeded".
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"retry-after": str(self.retry_after)} if self.retry_after else {}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})
