"""The OpenAPI document: from the schema that judges the requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from halfbyte.serve.adapters import NAME
from halfbyte.serve.schema import ChatRequest, CompletionRequest, LoadRequest

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {
            "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "null"]},
        },
    }},
}  # fmt: skip
_STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 421, 429, 503)


def openapi_document() -> dict[str, Any]:
    """OpenAPI 3.1 of all routes."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "pattern": NAME}}
    answers = _operation("The answer", "application/json")
    streamed = _operation("The answer", "application/json", "text/event-stream")
    paths = {
        "/": {"get": _operation("A chat page", "text/html")},
        "/health": {"get": _operation("The engine works", "application/json")},
        "/metrics": {"get": _operation("Prometheus text", "text/plain")},
        "/openapi.json": {"get": _operation("This document", "application/json")},
        "/v1/models": {"get": _operation("The base and its adapters", "application/json")},
        "/v1/models/{name}": {"get": {**answers, "parameters": [name]}},
        "/v1/chat/completions": {"post": {**streamed, "requestBody": _body(ChatRequest, schemas)}},
        "/v1/completions": {"post": {**streamed, "requestBody": _body(CompletionRequest, schemas)}},
        "/admin/adapters": {"post": {**answers, "requestBody": _body(LoadRequest, schemas)}},
        "/admin/adapters/{name}": {"delete": {**answers, "parameters": [name]}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "halfbyte serve", "version": "1"},
        "paths": paths,
        "security": [{"key": []}],
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(text: str, *kinds: str) -> dict[str, Any]:
    error = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    return {"responses": {
        "200": {"description": text, "content": {kind: {} for kind in kinds}},
        **{str(status): error for status in _STATUSES},
    }}  # fmt: skip


def _body(model: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    found = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(found.pop("$defs", {}))
    schemas[model.__name__] = found
    return {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}},
    }
