"""A config of another tool as one flat dict: YAML, JSON, arguments as typed, or a Python script's."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import yaml

from halfbyte.config.load import SECTIONS
from halfbyte.elsewhere.script import is_script, read_script
from halfbyte.errors import ConfigError

MOST_BYTES = 1_000_000
_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
"""Numbers like 2e-4, which YAML 1.1 takes for text."""


def read_settings(path: Path) -> dict[str, Any]:
    """The keys of the file and their values, numbers as numbers.

    Raises:
        ConfigError: it cannot be read, is over 1 MB, or is no mapping.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            "cannot be read", where=where, why=error.strerror or str(error), fix="Give the path of a config or script"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError("not valid UTF-8", where=where, why=f"byte {error.start + 1}") from None
    if len(raw) > MOST_BYTES:
        raise ConfigError("too long for a config", where=where, why=f"more than {MOST_BYTES:,} bytes")
    _refuse_own(path, text)
    script = is_script(path.name, text)
    try:
        value = read_script(text) if script else _arguments(text) if _is_typed(text) else _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = "is no Python" if script else "is neither YAML nor JSON nor arguments nor a Python script"
        raise ConfigError(what, where=where, why=_first_line(error)) from None
    if not isinstance(value, dict) or not value:
        fix = "Give YAML, JSON, the arguments as typed, or the Python script (docs/elsewhere.md shows each)"
        raise ConfigError("is no config", where=where, why="it holds no keys", fix=fix)
    return {str(key): _plain(part) for key, part in value.items()}


def _refuse_own(path: Path, text: str) -> None:
    try:
        sections = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        return
    if any(isinstance(sections.get(name), dict) for name in SECTIONS):
        raise ConfigError(
            "is halfbyte's own already", where=str(path), fix=f"Use it as it is: halfbyte train --config {path}"
        )


def _is_typed(text: str) -> bool:
    return re.search(r"(^|\s)--\w", text) is not None and not text.lstrip().startswith("{")


def _parse(text: str) -> Any:
    if text.lstrip().startswith("{"):
        return json.loads(text)
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise ValueError("aliases (*name) are not read: write the values out")
    return yaml.safe_load(text)


def _arguments(text: str) -> dict[str, Any]:
    """``--key value``, ``--key=value``, ``--key``: values as YAML reads them, several as a list."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, list[str]] = {}
    last: list[str] = []
    for word in shlex.split(" ".join(lines)):
        if re.match(r"--\w", word):
            key, equals, value = word[2:].partition("=")
            last = found.setdefault(key.replace("-", "_"), [])
            last[:] = [value] if equals else []
        else:
            last.append(word)
    values = {key: [_parse(word) for word in words] for key, words in found.items()}
    return {key: part[0] if len(part) == 1 else part or True for key, part in values.items()}


def without_parts(value: Mapping[str, Any], keep: Container[str]) -> dict[str, Any]:
    """`value` with the keys of its parts, such as quantization_config, as its own; those in `keep` stay parts."""
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= without_parts(part, keep) if isinstance(part, dict) and key not in keep else {key: part}
    return flat


def _plain(value: Any) -> Any:
    if type(value) is str:
        return float(value) if _SCIENTIFIC.fullmatch(value) else None if value == "None" else value
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def unquoted(value: Any) -> Any:
    """The number or the truth value that a text spells; anything else as it is."""
    if type(value) is not str:
        return value
    if re.fullmatch(r"[+-]?\d+", value):
        return int(value)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)", value):
        return float(value)
    return {"true": True, "false": False}.get(value.lower(), value)


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0][:200] if str(error) else "nested too deeply"
