"""TOML file + ``section.key=value`` settings -> RunConfig; an unknown key is an error with the nearest name."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from halfbyte.config.schema import RunConfig, to_dict
from halfbyte.errors import ConfigError

SECTIONS: dict[str, type] = {f.name: typing.get_type_hints(RunConfig)[f.name] for f in fields(RunConfig)}


def load_config(path: str | Path | None = None, settings: Iterable[str] = (), **flags: Any) -> RunConfig:
    """Build a RunConfig; later sources win: defaults, `path`, `flags`, `settings`.

    Args:
        path: a TOML file, or None.
        settings: texts "section.key=value" as given to ``--set``.
        flags: values by "section__key"; None means "not given".

    Raises:
        ConfigError: unknown section or key (naming the nearest), wrong type, value out of range.
    """
    values: dict[str, dict[str, Any]] = {}
    if path is not None:
        for section, table in _read_toml(Path(path)).items():
            if not isinstance(table, dict):
                raise ConfigError(f"{section!r} stands outside a section", where=str(path), fix="Put it under [train]")
            for key, value in table.items():
                _put(values, section, key, value, where=str(path))
    for name, value in flags.items():
        if value is not None:
            section, _, key = name.partition("__")
            _put(values, section, key, value, where="")  # what is wrong with it names its key
    for setting in settings:
        name, equals, text = setting.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot):
            raise ConfigError("a setting has the form section.key=value", where=f"--set {setting}")
        _put(values, section, key, _parse_text(text.strip(), section, key), where=f"--set {setting}")
    return config_from_dict(values)


def config_from_dict(values: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """RunConfig from nested dicts such as `to_dict` gives; missing keys take their defaults."""
    known: dict[str, dict[str, Any]] = {}
    for section, table in values.items():
        for key, value in table.items():
            _put(known, section, key, value, where=f"{section}.{key}")
    return RunConfig(**{section: SECTIONS[section](**table) for section, table in known.items()})


def settings_of(run: RunConfig) -> list[str]:
    """`run` as the "section.key=value" of what differs from the defaults."""
    plain = to_dict(RunConfig())
    return [
        f"{section}.{key}={json.dumps(list(value)) if isinstance(value, tuple | list) else _setting_text(value)}"
        for section, table in to_dict(run).items()
        for key, value in table.items()
        if value != plain[section][key]
    ]


def _setting_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


SIZES = ("memory.budget", "memory.host_budget", "memory.optimizer_budget")
"""Text with a unit, or a number of bytes."""


def field_help(section: type) -> dict[str, str]:
    """The text under each field of a config dataclass, by field name."""
    (class_def,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(class_def, ast.ClassDef)
    help_by_name: dict[str, str] = {}
    for statement, following in zip(class_def.body, class_def.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            help_by_name[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return help_by_name


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), fix="halfbyte init writes one") from None
    except OSError as error:
        raise ConfigError("cannot be read", where=str(path), why=error.strerror or str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("is not valid TOML", where=str(path), why=str(error)) from None


def _parse_text(text: str, section: str, key: str) -> Any:
    """A --set value: TOML's reading where it has one, else the text itself (so quotes are not needed).

    A setting that takes text gets text: ``train.output=2024`` is a folder, not a number.
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if takes_text(f"{section}.{key}") and not isinstance(value, str) else value


def takes_text(name: str) -> bool:
    """Whether "section.key" is a setting that takes any text."""
    section, _, key = name.partition(".")
    return section in SECTIONS and typing.get_type_hints(SECTIONS[section]).get(key) is str


def _put(values: dict[str, dict[str, Any]], section: str, key: str, value: Any, *, where: str) -> None:
    if section not in SECTIONS:
        raise ConfigError(f"unknown section {section!r}", where=where, fix=nearest(section, SECTIONS))
    types_by_key = typing.get_type_hints(SECTIONS[section])
    if key not in types_by_key:
        raise ConfigError(f"unknown key {section}.{key}", where=where, fix=nearest(key, types_by_key))
    values.setdefault(section, {})[key] = _coerce(value, types_by_key[key], f"{section}.{key}", where)


def nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}" if near else "Known are " + ", ".join(known)


def _coerce(value: Any, kind: Any, key: str, where: str) -> Any:
    """`value` as the annotated type `kind`; ints pass as floats, lists as tuples; nothing else is bent."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        for option in get_args(kind):
            try:
                return _coerce(value, option, key, where)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in get_args(kind):
            return value
        choices = ", ".join(map(str, get_args(kind)))
        raise ConfigError(f"{key} cannot be {value!r}", where=where, why=f"choose one of {choices}")
    elif origin is tuple:
        item = get_args(kind)[0]
        if isinstance(value, str) and item is str:
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(part, item, key, where) for part in value)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif kind is str and key in SIZES and isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value))
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key} cannot be {value!r}", where=where, why=f"it takes {_in_words(kind)}")


def _in_words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {_PLURALS[get_args(kind)[0]]}"
    if get_origin(kind) in (Union, types.UnionType):
        options = [option for option in get_args(kind) if not (option is int and float in get_args(kind))]
        return " or ".join(map(_in_words, options))
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, get_args(kind)))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


_PLURALS = {str: "texts", float: "numbers"}
