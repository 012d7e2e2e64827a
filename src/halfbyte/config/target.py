"""What a command may write: a folder or file that is not there yet, or a folder of ours, in a folder that is there."""

from __future__ import annotations

import json
from pathlib import Path

from halfbyte.errors import ConfigError

MANIFEST = "manifest.json"
MARKER = ".halfbyte-writing"


def check_parent(path: Path) -> None:
    """ConfigError unless `path`, a folder or a file, is to lie in a folder that is there: a slip makes no folders."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"there is no folder {parent} to put it in", where=str(path), fix="Make that folder first")


def check_new(final: Path) -> None:
    """ConfigError unless `final` can become a folder or file and overwrites nothing: absent, or an empty folder."""
    check_parent(final)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError("is there already", where=str(final), fix="Give another --output, or move this one away")


def check_target(final: Path) -> None:
    """ConfigError unless `final` may be written: absent, an empty folder, or one that halfbyte wrote."""
    if final.exists() and not final.is_dir():
        raise ConfigError("is a file, not a folder", where=str(final), fix="Give another folder")
    if final.is_dir() and any(final.iterdir()) and not is_ours(final):
        raise ConfigError(
            "the folder holds files that halfbyte did not write", where=str(final),
            fix="Give another folder, or move this one away",
        )  # fmt: skip


def is_ours(folder: Path) -> bool:
    """Whether halfbyte wrote `folder` or is writing it."""
    if (folder / MARKER).is_file():
        return True
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("written_by") == "halfbyte"
