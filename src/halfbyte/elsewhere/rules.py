"""What becomes of one key of another tool's config: a rule says it, and these functions make the usual ones."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a key and its value mean here."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values by "section.key"; none where halfbyte does so in any case."""
    differs: str = ""
    """What is not quite the same; empty: nothing."""
    missing: str = ""
    """Why there is no counterpart; empty: there is one."""
    refused: str = ""
    """What the whole config is for that halfbyte train does not do; empty: nothing."""


Rule = Callable[[Any, Mapping[str, Any]], Outcome]
"""(value, the whole config) -> what it means."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tool whose configs are read."""

    name: str
    rules: Mapping[str, Rule]
    """By the tool's key."""
    defaults: Mapping[str, Any]
    """What the tool does where its config is silent and halfbyte would do otherwise, by the tool's key."""
    marks: frozenset[str]
    """Keys by which its configs are known."""
    in_parts: bool = False
    """Keys may stand in parts, such as "peft_config", that count for nothing themselves."""


def same(key: str) -> Rule:
    """The setting `key` with the same meaning."""
    return lambda value, _: Outcome(settings={key: value})


def nearly(key: str, how: str, *, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The setting `key`, whose meaning differs as `how` says."""
    return lambda value, _: Outcome(settings={key: convert(value)}, differs=how)


def choice(table: Mapping[Any, Outcome], otherwise: Callable[[Any], Outcome]) -> Rule:
    """What `table` has for the value, in small letters if it is text."""

    def rule(value: Any, _: Mapping[str, Any]) -> Outcome:
        name = value.lower() if isinstance(value, str) else value
        return table[name] if isinstance(name, (str, bool, int)) and name in table else otherwise(value)

    return rule


def always(good: Any, otherwise: str) -> Rule:
    """Nothing to set if the value is `good`, what halfbyte does in any case; else the difference `otherwise`."""
    return lambda value, _: Outcome() if value == good else Outcome(differs=otherwise)


def nothing(why: str) -> Rule:
    """No counterpart; asked for nothing where the value is false, 0 or "no"."""
    return lambda value, _: Outcome() if value in (False, 0, "no", "none", "false") else Outcome(missing=why)


def preference(key: str, *, harmless: Container[Any] = (False,)) -> Rule:
    """`key`, which says that answers are compared, but for the values that are `harmless`."""

    def rule(value: Any, _: Mapping[str, Any]) -> Outcome:
        return Outcome() if value in harmless else Outcome(refused=f"{key} {value}")

    return rule


def flag(key: str, *, beyond: Mapping[str, Outcome] | None = None) -> Rule:
    """The boolean setting `key`, for tools that also take words: those `beyond`."""
    table = {True: Outcome(settings={key: True}), False: Outcome(settings={key: False})} | dict(beyond or {})
    return choice(table, lambda value: Outcome(missing=f"{value!r} is not known here"))
