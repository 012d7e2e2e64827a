"""One process at a time writes a run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.checkpoint.disk import folder_for
from halfbyte.errors import ConfigError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if need be, for this process; the lock ends with the block or the process, and is no file.

    Raises:
        ConfigError: another process holds it.
        ResourceError: the disk refuses.
    """
    with folder_for(folder):
        if os.name == "nt":  # cannot open folders
            yield
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _lock(descriptor, folder)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            "another process is training into this folder", where=str(folder),
            fix="Wait for it, or give another --output",
        ) from None  # fmt: skip
    except OSError:  # a network file system that cannot lock folders
        pass
