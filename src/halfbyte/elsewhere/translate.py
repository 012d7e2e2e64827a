"""Another tool's config -> ours, with an account of every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from halfbyte.config import load_config
from halfbyte.config.load import SECTIONS, takes_text
from halfbyte.config.write import Setting, to_toml
from halfbyte.elsewhere.axolotl import AXOLOTL
from halfbyte.elsewhere.llamafactory import INFO, LLAMAFACTORY
from halfbyte.elsewhere.read import read_settings, unquoted, without_parts
from halfbyte.elsewhere.rules import Outcome, Source
from halfbyte.elsewhere.script import NotWritten
from halfbyte.elsewhere.trl import TRL
from halfbyte.elsewhere.unsloth import UNSLOTH
from halfbyte.errors import ConfigError

SOURCES: Mapping[str, Source] = {source.name: source for source in (AXOLOTL, LLAMAFACTORY, UNSLOTH, TRL)}
ORDER = [f"{section}.{part.name}" for section, kind in SECTIONS.items() for part in fields(kind)]


@dataclass(frozen=True, kw_only=True)
class Translation:
    """What a config becomes here."""

    source: str
    """A key of `SOURCES`."""
    path: str
    settings: Mapping[str, Setting]
    """By "section.key"."""
    mapped: Mapping[str, str]
    """Their key -> our settings, "always so" where there is nothing to set."""
    differs: Mapping[str, str]
    """Their key -> what is not quite the same."""
    unmapped: Mapping[str, str]
    """Their key -> why it has no counterpart."""
    defaults: Mapping[str, str]
    """Where the config is silent: their key, whose default is not ours -> our settings."""
    hint: str = ""
    """Whose config it rather looks like; empty: nobody else's."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        settings = {key: setting.value for key, setting in self.settings.items()}
        return {
            "from": self.source, "settings": settings, "mapped": dict(self.mapped), "differs": dict(self.differs),
            "unmapped": dict(self.unmapped), "defaults": dict(self.defaults), "hint": self.hint,
        }  # fmt: skip

    def toml(self) -> str:
        """The file, with the account as comments."""
        head = [
            f"From {self.path} ({self.source}), by halfbyte import-config; beside each value the key it comes from."
        ]
        loose = [f"{key}: {how}" for key, how in self.differs.items() if key not in self._noted()]
        foot = ["Differs, with nothing to set:", *loose] if loose else []
        if self.unmapped:
            foot += ["", "No counterpart:"] if foot else ["No counterpart:"]
            foot += [f"{key}: {why}" for key, why in self.unmapped.items()]
        return to_toml(self.settings, head=head, foot=foot)

    def _noted(self) -> set[str]:
        return {setting.note.partition(":")[0] for setting in self.settings.values() if setting.note}


def translate(path: Path, source: str = "auto") -> Translation:
    """Read a config of `source` ("auto": whose keys it has) and say what it becomes.

    Raises:
        ConfigError: the file is no config, a value is not possible here, it is for preference tuning, or nobody knows
            whose it is.
    """
    read = read_settings(path)
    chosen, hint = _whose(read, path, source)
    own = without_parts(read, chosen.rules) if chosen.in_parts else read
    texts = {key: value for key, value in own.items() if value not in (None, "", [], {})}
    given = {key: unquoted(value) for key, value in texts.items()}
    config = {**chosen.defaults, **given, **_beside(path, chosen, given)}
    settings: dict[str, Setting] = {}
    mapped: dict[str, str] = {}
    differs: dict[str, str] = {}
    unmapped: dict[str, str] = {}
    defaults: dict[str, str] = {}
    for key, value in config.items():
        outcome = _outcome(chosen, key, value, config)
        if outcome.refused:
            raise _preference(path, outcome.refused)
        if any(takes_text(name) for name in outcome.settings):
            outcome = _outcome(chosen, key, texts.get(key, value), config)
        why = key if key in given else f"{chosen.name}'s default"
        for name, part in outcome.settings.items():
            checked = _checked(name, part, f"{path}: {key}")
            note = f"{key}: {outcome.differs}" if outcome.differs and name == next(iter(outcome.settings)) else ""
            if name not in settings or key in given:
                settings[name] = Setting(value=checked, why=why, note=note)
        if key not in given and not (outcome.settings or outcome.differs):
            continue
        if outcome.missing:
            unmapped[key] = outcome.missing
        elif outcome.differs:
            differs[key] = outcome.differs
        elif key not in given:
            defaults[key] = ", ".join(outcome.settings)
        else:
            mapped[key] = ", ".join(outcome.settings) or "always so"
    ordered = dict(sorted(settings.items(), key=lambda item: ORDER.index(item[0])))
    return Translation(
        source=chosen.name, path=str(path), settings=ordered, mapped=mapped, differs=differs, unmapped=unmapped,
        defaults=defaults, hint=hint,
    )  # fmt: skip


def _outcome(source: Source, key: str, value: Any, config: Mapping[str, Any]) -> Outcome:
    if key not in source.rules:
        return Outcome(missing="not known here")
    outcome = source.rules[key](value, config)
    if isinstance(value, NotWritten) and not (outcome.differs or outcome.refused):
        return Outcome(missing=f"the script computes it: {value}")
    return outcome


def _preference(path: Path, what: str) -> ConfigError:
    return ConfigError(
        "is for tuning by preferences or rewards, which halfbyte train does not do", where=str(path), why=what,
        fix="TRL does it on the same 4-bit base: configs/preference.py, docs/adapters.md, docs/tools.md",
    )  # fmt: skip


def _whose(given: Mapping[str, Any], path: Path, source: str) -> tuple[Source, str]:
    """The tool `source`, or that most of whose own keys the config has; and whose it rather looks like."""
    keys = given.keys() | without_parts(given, ()).keys()
    counts = {name: len(source.marks & keys) for name, source in SOURCES.items()}
    best = max(counts, key=lambda name: counts[name])
    if source != "auto":
        other = counts[best] > counts[source]
        return SOURCES[source], f"its keys look like {best}'s: try --from {best}" if other else ""
    if counts[best] == 0:
        raise ConfigError(
            "whose config this is does not show", where=str(path), fix="Say it: --from " + "|".join(SOURCES)
        )
    return SOURCES[best], ""


def _beside(path: Path, source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory's description of its data, from beside the config or the current folder."""
    if source is not LLAMAFACTORY:
        return {}
    name = Path(str(given.get("dataset_dir") or "data")) / INFO
    for folder in (Path(), *path.absolute().parents[:4]):
        if (folder / name).is_file():
            return {INFO: {key: part for key, part in read_settings(folder / name).items() if isinstance(part, dict)}}
    return {}


def _checked(name: str, value: Any, where: str) -> Any:
    """`value` as the setting takes it."""
    section, _, key = name.partition(".")
    try:
        found = getattr(getattr(load_config(None, (), **{f"{section}__{key}": value}), section), key)
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be {value!r}", where=where, why=error.why or error.what) from None
    return list(found) if isinstance(found, tuple) else found
