"""The one way halfbyte writes files: whole under their final name, or not there at all, also after a power cut.

A folder is written beside its final place and renamed when it is complete::

    .tmp-<name>-<pid>/      being written, or about to be deleted; ours by `.halfbyte-writing` or by its manifest
    .old-<name>-<pid>/      the folder that is being replaced, for the moment between two renames
    .halfbyte-<name>-<pid>  a single file being written
    <name>/manifest.json    written last: {"written_by", "format", "files": {path: {"size", "sha256"}}}

Order: files, fsync of each, manifest, fsync, fsync of the folder, rename, fsync of the parent. Nothing is deleted that
does not carry our mark, and nothing that a living process may still be writing.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.checkpoint.disk import check_space, disk_errors, make_folder, sync_folder
from halfbyte.checkpoint.manifest import FORMAT_VERSION, list_files, strangers, verifies
from halfbyte.checkpoint.shard_writer import write_one
from halfbyte.config.target import MANIFEST, MARKER, check_target, is_ours
from halfbyte.errors import FileError

logger = logging.getLogger("halfbyte")

_FILE_LEFTOVER = re.compile(r"\.halfbyte-.+-(\d{1,9})", re.DOTALL)
_LEFTOVER = re.compile(r"\.(old|tmp)-(.+)-(\d{1,9})", re.DOTALL)


class FolderWriter:
    """A folder while it is being written. Other writers may put files under `path` too; all are sealed alike."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a new file `name`."""
        with (self.path / name).open("xb") as file:
            file.write(data)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write `value` as indented JSON with sorted keys (finite numbers only)."""
        self.write_bytes(name, _json_bytes(value))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write `tensors` (any shapes and dtypes, any device) as one safetensors file; large CPU ones uncopied."""
        write_one(self.path / name, tensors)


@contextmanager
def write_folder(final: str | Path, *, expected_bytes: int = 0, set_aside: bool = False) -> Iterator[FolderWriter]:
    """Write a folder that appears under its name only when it is whole and on disk.

    An older folder of ours is replaced; files in it that are not ours are kept, in ``<name>.old-1``.

    Args:
        final: the folder's name; its parents are made.
        expected_bytes: refuse at once when the disk has less free.
        set_aside: a folder that is not provably ours (its manifest may be damaged) becomes ``<name>.old-1``, instead
            of being refused.

    Raises:
        ConfigError: `final` is a file, or a folder that halfbyte did not write (nothing is touched).
        ResourceError: the disk refuses; nothing is left under `final` but what was there before.
    """
    final = Path(os.path.realpath(final))
    with disk_errors(final):
        make_folder(final.parent)
        recover(final.parent, final.name)
        if not (set_aside and final.is_dir()):
            check_target(final)
        check_space(final.parent, expected_bytes)
        temp = _free_name(final)
        temp.mkdir()
    try:
        with disk_errors(final, only_below=temp):
            (temp / MARKER).touch()
            yield FolderWriter(temp)
        with disk_errors(final):
            _seal(temp)
            _publish(temp, final)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def write_file(path: str | Path, data: bytes) -> None:
    """Write one file so that `path` holds either its old bytes or all of `data`, also after a power cut.

    Raises:
        ResourceError: the disk refuses; `path` is as it was.
    """
    path = Path(os.path.realpath(path))
    with disk_errors(path):
        make_folder(path.parent)
        _clear_files(path.parent, path.name)
        temp = _free_name(path, ".halfbyte")
        file = temp.open("xb")
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def remove_folder(path: str | Path) -> bool:
    """Delete a folder that `write_folder` wrote; False, and untouched, when it holds anything else."""
    path = Path(os.path.realpath(path))
    if not is_ours(path) or strangers(path):
        return False
    trash = _free_name(path)
    with disk_errors(path):
        os.rename(path, trash)
        _delete(trash)
    return True


def recover(parent: Path, name: str = "") -> None:
    """Finish what killed processes left in `parent`: half-written files and folders go, a folder cut off while it was
    being replaced comes back, as the new one if that is whole, else as the old one. Never fails and never deletes what
    is not ours.

    Args:
        parent: the folder to look in (not below).
        name: the folder this process is about to write; its leftovers under our own process number go too.
    """
    _clear_files(parent, "")
    for path in sorted((*parent.glob(".old-*"), *parent.glob(".tmp-*"))):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not path.is_dir() or path.is_symlink():
            continue
        kind, target, pid = match[1], match[2], int(match[3])
        if (target != name) if pid == os.getpid() else _alive(pid):
            continue
        with suppress(OSError):
            path.rmdir()  # killed before its first file: only an empty folder goes here
        with suppress(OSError, FileError):
            if is_ours(path):
                _settle(path, kind, parent / target)


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _clear_files(parent: Path, name: str) -> None:
    """Delete what killed processes left of files they were writing in `parent`, named `name`."""
    for path in parent.glob(f".halfbyte-{glob.escape(name) or '*'}-*"):
        match = _FILE_LEFTOVER.fullmatch(path.name)
        if match is not None and path.is_file() and not path.is_symlink() and not _alive(int(match[1])):
            with suppress(OSError):
                path.unlink()


def _free_name(final: Path, kind: str = ".tmp") -> Path:
    names = (f"{kind}-{final.name}{f'-{n}' if n else ''}-{os.getpid()}" for n in count())
    return next(path for name in names if not (path := final.parent / name).exists())


def _seal(temp: Path) -> None:
    """fsync every file, then write the manifest."""
    files = {}
    with ThreadPoolExecutor(1) as disk:
        for name in list_files(temp):
            with (temp / name).open("r+b") as file:
                synced = disk.submit(os.fsync, file.fileno())  # while this thread hashes
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": digest}
                synced.result()
    manifest = {"written_by": "halfbyte", "format": FORMAT_VERSION, "files": files}
    with (temp / MANIFEST).open("xb") as file:
        file.write(_json_bytes(manifest))
        file.flush()
        os.fsync(file.fileno())
    (temp / MARKER).unlink()
    for folder in (*(path for path in temp.rglob("*") if path.is_dir()), temp):
        sync_folder(folder)


def _publish(temp: Path, final: Path) -> None:
    if final.exists() and any(final.iterdir()) and not is_ours(final):
        _set_aside(final, final)
    if not final.exists() or not any(final.iterdir()):
        if final.exists():
            final.rmdir()
        os.rename(temp, final)
        sync_folder(final.parent)
        return
    old = final.parent / f".old-{final.name}-{temp.name.rpartition('-')[2]}"
    try:
        os.rename(final, old)
        os.rename(temp, final)
    except BaseException:
        if not final.exists():
            os.rename(old, final)
        raise
    sync_folder(final.parent)
    with suppress(OSError):  # the new folder is safe; what stays is cleared by the next write
        _retire(old, final)


def _settle(path: Path, kind: str, final: Path) -> None:
    """Finish what a killed process began with `path`, a folder of ours that was in the way to or from `final`."""
    if kind == "tmp" or (path / MARKER).exists():
        _delete(path)
        return
    if not final.exists():
        twin = path.with_name(path.name.replace(".old-", ".tmp-", 1))
        os.rename(twin if verifies(twin) else path, final)
        sync_folder(final.parent)
        logger.warning("%s: a replacement was cut off; finished it", final)
    if path.exists():
        _retire(path, final)


def _retire(old: Path, final: Path) -> None:
    """Delete a replaced folder of ours; keep it under a name people see if it holds something else too."""
    if strangers(old):
        _set_aside(old, final)
    else:
        _delete(old)


def _set_aside(folder: Path, final: Path) -> None:
    number = next(n for n in count(1) if not final.with_name(f"{final.name}.old-{n}").exists())
    kept = final.with_name(f"{final.name}.old-{number}")
    os.rename(folder, kept)
    logger.warning("%s: replaced; the older one holds files that are not ours and is kept as %s", final, kept.name)


def _delete(folder: Path) -> None:
    """Delete a folder of ours; the mark goes last, so that a kill on the way leaves it provably ours."""
    with suppress(OSError):  # a full disk: the manifest serves as the mark
        (folder / MARKER).touch()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path != folder / MARKER:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def _alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # no harmless way to ask: leave it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
