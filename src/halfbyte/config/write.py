"""A TOML file with a reason beside each value, for people to read and go on from."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value and why it is that."""

    value: Any
    why: str = ""
    """Stands behind the value."""
    note: str = ""
    """Stands above it."""


def to_toml(settings: Mapping[str, Setting], *, head: Iterable[str] = (), foot: Iterable[str] = ()) -> str:
    """The file's text; sections in the order of their first setting.

    Args:
        settings: by "section.key"; a value is text, a number, a boolean or a list of texts.
        head, foot: lines of comment before and after.
    """
    sections: dict[str, list[str]] = {}
    for name, setting in settings.items():
        section, _, key = name.partition(".")
        lines = sections.setdefault(section, [])
        lines += _comment(setting.note) if setting.note else []
        lines.append(f"{key} = {_value(setting.value)}" + (f"  # {_one_line(setting.why)}" if setting.why else ""))
    blocks = ["\n".join([f"[{section}]", *lines]) for section, lines in sections.items()]
    return "\n\n".join(block for block in (_comments(head), *blocks, _comments(foot)) if block) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value) if isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    """JSON's notation is TOML's for text, whole numbers and booleans, but for the character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comments(lines: Iterable[str]) -> str:
    return "\n".join(line for text in lines for line in _comment(text))


def _comment(text: str) -> list[str]:
    lines = textwrap.wrap(_one_line(text), WIDTH, subsequent_indent="  ", break_long_words=False)
    return [f"# {line}" for line in lines] or ["#"]


def _one_line(text: str) -> str:
    """No control character may stand in a comment."""
    return "".join(c if c.isprintable() else " " for c in text)
