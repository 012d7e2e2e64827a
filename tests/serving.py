"""`halfbyte serve` as a process, and a question to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")


def command(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "halfbyte", "serve", "--model", str(model), "--port", "0", "--name", "base",
            "--json", "--context", "256", *options]  # fmt: skip


@contextmanager
def running(log: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL."""
    with (
        log.open("w") as errors,
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            yield process, json.loads(line)["url"]
        finally:
            process.kill()


def ask(url: str, **fields: Any) -> Any:
    body = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0} | fields
    return httpx.post(url + "/v1/completions", json=body, timeout=60)
