"""What is merged: adapters, how much of each, and what they say of themselves."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import Adapter, load_adapter
from halfbyte.checkpoint.adapter import WEIGHTS
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.merge.update import Updates
from halfbyte.model.source import tokenizer_sha256


@dataclass(frozen=True)
class Part:
    """An adapter of which `weight` times the update is merged; `updates` are without the weight."""

    adapter: Adapter
    weight: float
    updates: Updates = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Of the adapter's tensor file."""
        with (self.adapter.folder / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def label(self) -> str:
        """For messages."""
        return str(self.adapter.folder)

    @property
    def data(self) -> dict[str, Any]:
        """Settings of the data it was trained on; empty where it records none."""
        found: dict[str, Any] = self.adapter.info.get("config", {}).get("data", {})
        return found

    def file(self, *keys: str) -> str:
        """The first of the files that `data` names by `keys` which is still there; "" for none."""
        return next((str(self.data[key]) for key in keys if self.data.get(key) and Path(self.data[key]).is_file()), "")

    def record(self) -> dict[str, Any]:
        """For halfbyte.json."""
        return {"adapter": self.label, "adapter_sha256": self.sha256, "weight": self.weight}


def read_parts(weights: Mapping[str, float]) -> tuple[Part, ...]:
    """Read and check the adapter folders of `weights`, which says how much of each.

    Raises:
        AdapterError: as `load_adapter`; one of them twice.
        ConfigError: none, or a weight that is no number.
    """
    parts: list[Part] = []
    for folder, weight in weights.items():
        if not math.isfinite(weight) or weight == 0:
            raise ConfigError(f"{weight:g} of {folder} cannot be added", where="--adapter", fix=f"Give {folder}=0.5")
        part = Part(load_adapter(folder), weight)
        twin = next((other for other in parts if other.sha256 == part.sha256), None)
        if twin is not None:
            raise AdapterError(f"is the same as {twin.label}", where=part.label, fix="Give it once, with one weight")
        parts.append(part)
    if not parts:
        raise ConfigError("is not set", where="--adapter", fix="Give --adapter")
    return tuple(parts)


def refuse_dora(parts: tuple[Part, ...], *, alone: bool) -> None:
    """AdapterError where DoRA, which adds no product of two factors, is to be part of a sum or written `alone`."""
    for part in parts:
        if part.adapter.config.get("use_dora") and (alone or len(parts) > 1 or part.weight != 1):
            raise AdapterError(
                "is DoRA, whose update has no factors to add or to write", where=part.label,
                fix="Merge it alone, with weight 1, into 16bit, 4bit or gguf",
            )  # fmt: skip


def refuse_start(parts: tuple[Part, ...]) -> None:
    """AdapterError where an adapter holds what quantization took from its base: 16-bit weights have it already."""
    for part in parts:
        info = part.adapter.info
        init = info.get("init") or info.get("config", {}).get("lora", {}).get("init", "random")
        if init != "random":
            raise AdapterError(
                f"began at {init}, which makes up for the quantized base", where=part.label,
                why="the original weights lack nothing of it", fix="Merge with --base quantized",
            )  # fmt: skip


def template_hash(part: Part, tokenizer: Any, base: str, *, any_template: bool) -> str:
    """The hash of `tokenizer`, with the adapter's own chat template where another one is let pass.

    Raises:
        AdapterError: the adapter was trained with another template, and that is not let pass.
    """
    theirs = part.adapter.info.get("chat_template", tokenizer.chat_template)
    if theirs == tokenizer.chat_template:
        return tokenizer_sha256(tokenizer)
    if not any_template:
        raise AdapterError(
            f"was trained with another chat template than that of {base}", where=part.label,
            fix="Prompts would be put to it in words it does not know; --any-template merges all the same",
        )  # fmt: skip
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = theirs
    return tokenizer_sha256(tokenizer)


def common(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What all of `records` say alike, sections taken apart."""
    first, *rest = records or [{}]
    same = {}
    for key, value in first.items():
        others = [record.get(key) for record in rest]
        if isinstance(value, dict) and all(isinstance(other, dict) for other in others):
            same[key] = common([value, *others])  # type: ignore[list-item]
        elif all(other == value for other in others):
            same[key] = value
    return same
