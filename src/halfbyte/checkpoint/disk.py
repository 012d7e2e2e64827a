"""What the disk says, as our errors; folders that survive a power cut."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.dtypes import format_bytes
from halfbyte.errors import DISK_ERRNOS, disk_error


@contextmanager
def disk_errors(where: Path, only_below: Path | None = None) -> Iterator[None]:
    """Errors of the disk become a ResourceError at `where`; given `only_below`, those of files elsewhere pass."""
    try:
        yield
    except OSError as error:
        path = Path(os.fsdecode(error.filename)) if error.filename else None
        foreign = not path.is_relative_to(only_below or path) if path else error.errno not in DISK_ERRNOS
        if only_below and foreign:
            raise
        raise disk_error(where, error.errno, str(error)) from error


def check_space(folder: Path, num_bytes: int) -> None:
    """ResourceError when the disk of `folder` has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free if num_bytes else 0
    if free < num_bytes:
        what = f"needs {format_bytes(num_bytes)}, the disk has {format_bytes(free)} free"
        raise disk_error(folder, errno.ENOSPC, what=what)


def make_folder(path: Path) -> None:
    """Make `path` and its parents, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


@contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """Make `path` if need be, and take it away again where the block ends in an error and left nothing in it."""
    new = not path.exists()
    with disk_errors(path):
        make_folder(path)
    try:
        yield
    except BaseException:
        if new and not any(path.iterdir()):
            path.rmdir()
        raise


def sync_folder(path: Path) -> None:
    """Make the names in `path` durable."""
    if os.name == "nt":
        return  # Windows cannot open a folder; its renames are journalled
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)
