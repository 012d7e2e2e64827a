"""All routes of the server."""

from __future__ import annotations

import asyncio
import logging
import time
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from halfbyte.errors import HalfbyteError, ResourceError
from halfbyte.serve.adapters import Adapters
from halfbyte.serve.bodies import BODY_BYTES, CONTEXT_BYTES, Bodies
from halfbyte.serve.engine import Engine
from halfbyte.serve.errors import ApiError
from halfbyte.serve.generate import Generation
from halfbyte.serve.guard import App, Guard, Keys
from halfbyte.serve.metrics import metrics_text
from halfbyte.serve.openapi import openapi_document
from halfbyte.serve.schema import LoadRequest, parse
from halfbyte.serve.sequence import ServedAdapter
from halfbyte.serve.text import Texts

log = logging.getLogger("halfbyte.serve")
STUCK_SECONDS = 60.0
"""A turn of the engine that takes longer than this means that it hangs."""
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; " \
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # fmt: skip


def make_app(
    engine: Engine, adapters: Adapters, texts: Texts, keys: Keys, *, local_only: bool, planned_memory: int = 0
) -> App:
    """The server as an ASGI application."""
    bodies = Bodies(max(BODY_BYTES, CONTEXT_BYTES * texts.context))
    generation = Generation(engine, adapters, texts, bodies)
    routes = _Routes(engine, adapters, bodies, planned_memory)
    app = Starlette(
        routes=[
            Route("/", routes.page, methods=["GET"]),
            Route("/health", routes.health, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/openapi.json", routes.openapi, methods=["GET"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{name}", routes.model, methods=["GET"]),
            Route("/v1/chat/completions", generation.chat, methods=["POST"]),
            Route("/v1/completions", generation.complete, methods=["POST"]),
            Route("/admin/adapters", routes.load, methods=["POST"]),
            Route("/admin/adapters/{name}", routes.unload, methods=["DELETE"]),
        ],
        exception_handlers={ApiError: _told, HTTPException: _refused, Exception: _failed},
    )
    app.router.redirect_slashes = False
    return Guard(app, keys, local_only=local_only)


class _Routes:
    def __init__(self, engine: Engine, adapters: Adapters, bodies: Bodies, planned_memory: int) -> None:
        self._engine, self._adapters, self._bodies = engine, adapters, bodies
        self._planned_memory, self._planned_adapters = planned_memory, adapters.most_bytes

    async def page(self, request: Request) -> Response:
        text = files("halfbyte.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(
            text, headers={"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
        )

    async def health(self, request: Request) -> Response:
        engine = self._engine
        late = engine.running > 0 and time.monotonic() - engine.last_turn > STUCK_SECONDS
        well = engine.alive and not late
        found = {"status": "ok" if well else "failed", "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(found, 200 if well else 503)

    async def metrics(self, request: Request) -> Response:
        more = self._adapters.most_bytes - self._planned_adapters  # that were loaded meanwhile
        text = metrics_text(self._engine, self._adapters, self._planned_memory + more)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi_document())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_described(served) for served in self._adapters.all()]})

    async def model(self, request: Request) -> Response:
        served = self._adapters.find(request.path_params["name"])
        if served is None:
            raise ApiError(404, "no such model: see /v1/models", param="model", code="model_not_found")
        return JSONResponse(_described(served))

    async def load(self, request: Request) -> Response:
        async with self._bodies.read(request, most=4096) as body:
            name = parse(body, LoadRequest).name
        try:
            notes = await asyncio.to_thread(self._adapters.load_by_name, name)
        except HalfbyteError as error:
            raise ApiError(507 if isinstance(error, ResourceError) else 400, str(error), param="name") from None
        return JSONResponse({"name": name, "loaded": True, "notes": notes})

    async def unload(self, request: Request) -> Response:
        if not self._adapters.unload(request.path_params["name"]):
            raise ApiError(404, "no such adapter: see /v1/models", param="name", code="model_not_found")
        return JSONResponse({"name": request.path_params["name"], "loaded": False})


def _described(served: ServedAdapter) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "halfbyte"}


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, error.detail)
    return JSONResponse(told.body, told.status, {**(error.headers or {}), **told.headers})


async def _failed(request: Request, error: Exception) -> Response:
    log.error("%s: %s", request.scope.get("request_id"), type(error).__name__)
    return JSONResponse(ApiError(500, "internal error: see the server's log").body, 500)
