"""The manifest of a folder: what halfbyte wrote there, byte for byte, so that damage has a name."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from halfbyte.config.limits import check_limit
from halfbyte.config.target import MANIFEST, MARKER
from halfbyte.errors import ConfigError, FileError, read_error

FORMAT_VERSION = 1


def verify_folder(path: str | Path, *, required: bool = True, error: type[FileError] = FileError) -> dict[str, Any]:
    """Check every file of `path` against its manifest.

    Args:
        path: a folder written by `write_folder`.
        required: False accepts a folder without a manifest (one that another tool wrote).
        error: the kind of FileError to raise.

    Returns:
        The manifest; empty when there is none and none is required.

    Raises:
        FileError: no manifest, or a file is missing, shorter, longer or changed; names the file.
        ConfigError: a newer halfbyte wrote the folder.
    """
    path = Path(path)
    if not required and not (path / MANIFEST).exists():
        return {}
    manifest = read_json(path / MANIFEST, error=error)
    if manifest.get("written_by") != "halfbyte":
        raise error("is not a manifest of halfbyte", where=str(path / MANIFEST))
    version = manifest.get("format")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ConfigError(
            f"has format {version}, this halfbyte reads up to {FORMAT_VERSION}", where=str(path), fix="Update halfbyte"
        )
    files = manifest.get("files")
    if version != FORMAT_VERSION or not isinstance(files, dict):
        raise error("is not a manifest of halfbyte", where=str(path / MANIFEST))
    for name, entry in files.items():
        _verify_file(path, name, entry, error)
    return manifest


def read_json(path: Path, *, error: type[FileError] = FileError) -> dict[str, Any]:
    """The JSON object in `path`; `error` names the file when it is absent, beyond the limits, or something else."""
    try:
        check_limit("json_bytes", path.stat().st_size, "bytes", path, error)
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error("the file is missing", where=str(path)) from None
    except OSError as problem:
        raise read_error(error, path, problem) from None
    except (ValueError, RecursionError) as problem:
        if isinstance(problem, FileError):
            raise
        raise error("is not JSON", where=str(path), why=str(problem)) from None
    if not isinstance(value, dict):
        raise error("is not a JSON object", where=str(path))
    return value


def list_files(folder: Path) -> list[str]:
    """Every file below `folder`, as sorted relative paths with slashes; without manifest and marker."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name not in (MANIFEST, MARKER))


def strangers(folder: Path) -> list[str]:
    """Files below `folder` that its manifest does not list."""
    files = read_json(folder / MANIFEST).get("files")
    return [name for name in list_files(folder) if not isinstance(files, dict) or name not in files]


def verifies(folder: Path) -> bool:
    """Whether every file of `folder` is what its manifest says."""
    try:
        verify_folder(folder)
    except (FileError, ConfigError):
        return False
    return True


def _verify_file(folder: Path, name: str, entry: Any, error: type[FileError]) -> None:
    path = folder / name
    if not isinstance(entry, dict) or ".." in Path(name).parts or Path(name).is_absolute():
        raise error(f"has a bad entry for {name!r}", where=str(folder / MANIFEST))
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest() if size == entry.get("size") else ""
    except (FileNotFoundError, ValueError):
        raise error("the file is missing", where=str(path)) from None
    except OSError as problem:
        raise read_error(error, path, problem) from None
    if not digest:
        raise error(f"has {size} bytes, the manifest says {entry.get('size')}", where=str(path))
    if digest != entry.get("sha256"):
        raise error(
            "the bytes are not those that were written", where=str(path), why="its sha256 differs from the manifest's",
            fix=f"Restore the file, or delete {MANIFEST} if you changed it yourself",
        )  # fmt: skip
