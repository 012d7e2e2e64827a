"""schemathesis against the OpenAPI document: requests that fit it and requests that do not, and never a 5xx."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("schemathesis")


def test_the_document_is_the_schema(server: Any) -> None:
    document = httpx.get(server.url + "/openapi.json", headers=server.user).json()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["n"] == {"default": 1, "maximum": 16, "minimum": 1, "title": "N", "type": "integer"}
    assert set(document["paths"]) == {
        "/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/models/{name}", "/v1/chat/completions",
        "/v1/completions", "/admin/adapters", "/admin/adapters/{name}",
    }  # fmt: skip


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(server: Any, tmp_path: Path) -> None:
    document = httpx.get(server.url + "/openapi.json", headers=server.user).json()
    for name in ("ChatRequest", "CompletionRequest"):  # answers that end soon, of a model that exists
        fields = document["components"]["schemas"][name]["properties"]
        fields["model"] = {"enum": ["base", "a1"]}
        fields["max_tokens"]["maximum"] = 4
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(tmp_path / "openapi.json"), "--url", server.url]
    command += ["--mode", "all", "--max-examples", "40", "--checks", "not_a_server_error", "--seed", "1"]
    command += ["--header", f"Authorization: {server.admin['authorization']}", "--request-timeout", "60"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert httpx.get(server.url + "/health", headers=server.user).status_code == 200
