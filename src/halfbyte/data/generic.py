"""Text that is on every machine, to calibrate on where there is none of the user's: Python's reference and code."""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from halfbyte.errors import DataError

GENERIC = "generic"
"""The name that quant.calibrate gives this text."""
PIECE = 1500
"""Characters of a sample."""
MODULES = (
    "argparse", "asyncio/tasks", "collections/__init__", "csv", "datetime", "difflib", "email/message", "fractions",
    "http/client", "logging/__init__", "pathlib", "random", "statistics", "tarfile", "textwrap", "typing",
)  # fmt: skip


@contextmanager
def samples_file(name: str) -> Iterator[str]:
    """The file that `name` means: itself, or for "generic" one that is there for as long as this lasts."""
    if name != GENERIC or Path(name).exists():
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generic.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in _pieces()), encoding="utf-8")
        yield str(path)


def _pieces() -> list[str]:
    """Prose and code in turn, each in an order that is random and always the same.

    Raises:
        DataError: this Python came without both.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    sources = [root / f"{module}.py" for module in MODULES]
    code = [part for file in sources if file.is_file() for part in _cut(file.read_text(encoding="utf-8"))]
    prose = [part for name in sorted(topics) for part in _cut(topics[name])]
    if not code and not prose:
        raise DataError(
            "has no text of its own to calibrate on", where="this Python's standard library",
            fix="Give a file of samples as quant.calibrate",
        )  # fmt: skip
    shorter = min(len(prose), len(code)) or max(len(prose), len(code))
    return [text for both in zip(*(part[:shorter] for part in map(_mixed, (prose, code)) if part), strict=True)
            for text in both]  # fmt: skip


def _cut(text: str) -> list[str]:
    return [text[i : i + PIECE] for i in range(0, len(text) - PIECE // 4, PIECE)]


def _mixed(parts: list[str]) -> list[str]:
    return sorted(parts, key=lambda part: hashlib.sha256(part.encode()).digest())
