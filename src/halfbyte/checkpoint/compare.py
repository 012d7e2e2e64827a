"""Whether a run may go on from a checkpoint: what changed in the config since, and what of it changes the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.config import RunConfig, to_dict
from halfbyte.errors import ConfigError

ALLOWED = frozenset({
    "train.steps", "train.epochs", "train.save_every", "train.eval_every", "train.keep", "train.resume",
    "train.sharding", "train.output", "train.gradient_checkpointing", "data.eval", "optim.paged", "memory.budget",
    "memory.host_budget", "memory.weights", "model.device", "memory.resident_layers", "memory.activations",
    "memory.optimizer_budget", "memory.offload_dir",
})  # fmt: skip
"""Settings a resumed run may change: none of them alters a step that was already taken."""

SAME_BYTES = {"model.path": "base", "data.train": "data"}
"""Paths that may be spelled differently when the hash of this name is the same."""


ANYHOW = {"quant.scale": "base"}
"""What says nothing when the hash of this name is the same: `auto` is what the base has."""


@dataclass(frozen=True)
class Difference:
    """One setting, `key` as `section.name`, in the checkpoint and now."""

    key: str
    saved: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.key} {self.saved!r} -> {self.current!r}"


def compare_config(
    saved: Mapping[str, Mapping[str, Any]],
    current: Mapping[str, Mapping[str, Any]],
    *,
    saved_hashes: Mapping[str, str] | None = None,
    current_hashes: Mapping[str, str] | None = None,
) -> list[Difference]:
    """Compare the config of a checkpoint with the one asked for now.

    Args:
        saved, current: `to_dict(RunConfig)`; a setting that an older checkpoint lacks counts as its default.
        saved_hashes, current_hashes: sha256 by name (base, tokenizer, data); a name on one side only is not compared.

    Returns:
        The differences, all of them allowed ones, to be told to the user.

    Raises:
        ConfigError: something that shapes the result differs; lists every such field with both values.
    """
    before, now = dict(saved_hashes or {}), dict(current_hashes or {})
    old, new = _flat(to_dict(RunConfig())) | _flat(saved), _flat(current)
    missing = object()
    same = {name for name in before if before[name] == now.get(name)}
    differences = [
        Difference(key, old.get(key), new.get(key))
        for key in dict.fromkeys((*new, *old))
        if old.get(key, missing) != new.get(key, missing) and ANYHOW.get(key) not in same
    ]
    refused = [str(each) for each in differences if each.key not in ALLOWED and SAME_BYTES.get(each.key) not in same]
    refused += [
        f"sha256 of {name} {before[name][:12]} -> {now[name][:12]}"
        for name in before
        if name in now and name not in same
    ]
    if refused:
        raise ConfigError(
            "the checkpoint belongs to another run", where="train.resume", why="; ".join(refused),
            fix="Set these back, or start afresh with train.resume=never and another train.output",
        )  # fmt: skip
    return differences


def _flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By `section.name`, tuples as lists; without what files may ask for and who hears of it, which shapes nothing."""
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value
        for section, part in config.items()
        if section not in ("limits", "log")
        for name, value in part.items()
    }
