"""How much a file from elsewhere may ask for before it is refused: checked before anything is allocated for it.

Readers stand in every room, and a command reads everything within one set of limits, its config's, so these are held
in its context: `hold_to` sets them, and who does not has the defaults.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path

from halfbyte.errors import ConfigError, FileError, ModelError


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """[limits]: what a file may ask for before it is refused."""

    header_bytes: int = 100_000_000
    """Of a safetensors file's header; more than this default the safetensors library does not read."""
    json_bytes: int = 16 * 2**20
    """Of any JSON file: config.json, an index, an adapter's config, a manifest."""
    line_bytes: int = 16 * 2**20
    """Of a line of a data file."""
    tensors: int = 100_000
    """In one file."""
    name_bytes: int = 512
    """Of a tensor's or field's name."""
    dims: int = 8
    """Of a tensor."""
    text_bytes: int = 16 * 2**20
    """Of a text in a .gguf file's header, such as the chat template."""
    fields: int = 10_000
    """In a .gguf file's header."""
    items: int = 10_000_000
    """Of a list in a .gguf file's header (a vocabulary has some 250,000)."""
    layers: int = 10_000
    """That a config.json may say."""
    size: int = 2**24
    """Any other size that a config.json may say: hidden, intermediate, vocabulary, heads."""
    rank: int = 512
    """Of an adapter."""
    adapter_bytes: int = 8 * 2**30
    """Of an adapter's weights."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) < 1:
                raise ConfigError(f"{getattr(self, each.name)} is not possible", where=f"limits.{each.name}",
                                  why="at least 1")  # fmt: skip


_IN_FORCE: ContextVar[LimitsConfig] = ContextVar("limits", default=LimitsConfig())  # noqa: B039  (frozen)


def hold_to(limits: LimitsConfig) -> None:
    """From now on readers refuse what is beyond `limits`, in this context."""
    _IN_FORCE.set(limits)


def limit(name: str) -> int:
    """What the limit called `name` is now."""
    return int(getattr(_IN_FORCE.get(), name))


def check_limit(name: str, count: int, what: str, where: str | Path, error: type[FileError] = ModelError) -> None:
    """See that `count` is within the limit called `name`.

    Args:
        what: is counted, to follow the number: "tensors", "bytes".

    Raises:
        FileError: of type `error`; says the limit and how to raise it.
    """
    most = limit(name)
    if count > most:
        raise error(
            f"{count:,} {what}", where=str(where), why=f"limits.{name} is {most:,}",
            fix=f"If you trust the file, give --set limits.{name}={count}",
        )  # fmt: skip
