"""Reading and writing files past the page cache, into and out of buffers that are used again and again.

The page cache would hold a second copy of what passes, in the memory that is being saved. Where the file system takes
direct I/O (O_DIRECT), the disk moves the bytes straight to their place; where not, the cache is told to drop them.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from halfbyte.dtypes import format_bytes
from halfbyte.errors import FileError, disk_error, read_error

ALIGNMENT = 4096
"""Places in file and memory and lengths that direct I/O takes are multiples of the disk's block; this serves all."""
HUGE_PAGE = 1 << 21
BOUNCE_BYTES = 1 << 20
"""The piece in which bytes pass whose places in file and memory do not fit each other."""


def round_up(nbytes: int, unit: int = ALIGNMENT) -> int:
    """The next multiple of `unit`."""
    return -(-nbytes // unit) * unit


class AlignedBuffer:
    """Zeroed memory of its own, aligned to ALIGNMENT: what direct I/O fills. It goes when its last view goes.

    Args:
        pages: what maps the memory.

    Attributes:
        tensor: all of it, uint8 (nbytes,).
        view: the same bytes as a memoryview.
    """

    def __init__(self, nbytes: int, pages: type[mmap.mmap] = mmap.mmap) -> None:
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = pages(-1, round_up(max(nbytes, 1)), **private)
        if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults
        self.view = memoryview(memory)[:nbytes]
        self.tensor: Tensor = torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


class DirectFile:
    """A file whose bytes pass the page cache by. Several threads may call it at once, but not write in one block.

    Attributes:
        path: the file, for messages; of a scratch file its folder.
        nbytes: its length.
        direct: whether O_DIRECT is in force.
        why: why it is, or is not.
    """

    nbytes: int

    def __init__(self, path: str | Path) -> None:
        """Open `path` for reading.

        Raises:
            FileError: it is not there or cannot be opened.
        """
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise read_error(FileError, path, error) from error
        self._begin(Path(path), file)

    @classmethod
    def scratch(cls, folder: str | Path, nbytes: int) -> DirectFile:
        """A file of `nbytes` zeros, rounded up to whole blocks, to read and write. It has no name in `folder`, so it
        goes with the process, however that ends. Its room on the disk is taken now: the disk cannot be full later.

        Raises:
            ResourceError: the folder cannot be written, or the disk is full.
        """
        try:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise disk_error(folder, error.errno, str(error)) from error
        self = cls.__new__(cls)
        self._begin(Path(folder), file)
        if (kind := _file_system(folder)) in ("tmpfs", "ramfs"):
            self.why = f"{kind}: this folder is memory, not disk"
        self.grow(nbytes)
        return self

    def grow(self, nbytes: int) -> None:
        """Make a scratch file `nbytes` long, if it is shorter: with zeros, and room on the disk.

        Raises:
            ResourceError: the disk is full; the file is as it was.
        """
        nbytes = round_up(nbytes)
        more = nbytes - self.nbytes
        if more <= 0:
            return
        try:
            free = shutil.disk_usage(self.path).free
            if free < more:
                what = f"needs {format_bytes(more)}, the disk has {format_bytes(free)} free"
                raise disk_error(self.path, errno.ENOSPC, what=what)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), self.nbytes, more)
            else:
                self._file.truncate(nbytes)
        except OSError as error:
            raise disk_error(self.path, error.errno, str(error)) from error
        self.nbytes = nbytes

    def read_into(self, target: Tensor | memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on. Goes straight where both places are equal modulo ALIGNMENT.

        Args:
            target: contiguous, in host memory, of any dtype.

        Raises:
            FileError: the file ends too early.
            ResourceError: the disk reports an error.
        """
        view = _bytes_of(target)
        for start, stop, straight in self._pieces(view, offset):
            part = view[start - offset : stop - offset]
            if straight:
                self._read(part, start, len(part))
                continue
            first = start // ALIGNMENT * ALIGNMENT
            blocks = AlignedBuffer(round_up(stop) - first).view
            self._read(blocks, first, stop - first)
            part[:] = blocks[start - first : stop - first]

    def write_from(self, source: Tensor | memoryview, offset: int) -> None:
        """Write `source` to `offset` of a scratch file, within its length. Other bytes stay as they are.

        Args:
            source: contiguous, in host memory, of any dtype.

        Raises:
            ResourceError: the disk refuses.
        """
        view = _bytes_of(source)
        assert offset + len(view) <= self.nbytes, "not within the file"
        for start, stop, straight in self._pieces(view, offset):
            part = view[start - offset : stop - offset]
            if straight:
                self._write(part, start)
                continue
            first = start // ALIGNMENT * ALIGNMENT
            blocks = AlignedBuffer(round_up(stop) - first).view
            if len(blocks) > len(part):
                self._read(blocks, first, len(blocks))
            blocks[start - first : stop - first] = part
            self._write(blocks, first)

    def close(self) -> None:
        """Close it, as it is when nothing refers to it any more; a scratch file is gone then."""
        self._close()

    def _begin(self, path: Path, file: Any) -> None:
        self.path, self._file, self._lock = path, file, threading.Lock()
        self._close = weakref.finalize(self, file.close)
        self.nbytes = os.fstat(file.fileno()).st_size
        self.direct, self.why = False, "this system has no O_DIRECT"
        if not hasattr(os, "O_DIRECT"):
            return
        import fcntl  # not everywhere

        try:
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
            self._read_some(AlignedBuffer(ALIGNMENT).view, 0)
            self.direct, self.why = True, "the file system takes O_DIRECT"
        except OSError as error:
            fcntl.fcntl(file, fcntl.F_SETFL, 0)
            self.why = f"the file system takes no O_DIRECT ({error.strerror})"

    def _pieces(self, view: memoryview, offset: int) -> Iterator[tuple[int, int, bool]]:
        """(from, to, straight) in the file: what can go straight, and what goes by way of whole blocks elsewhere."""
        end = offset + len(view)
        if not self.direct:
            yield offset, end, True
        elif (np.frombuffer(view, np.uint8).ctypes.data - offset) % ALIGNMENT:
            for start in range(offset // ALIGNMENT * ALIGNMENT, end, BOUNCE_BYTES):
                yield max(start, offset), min(start + BOUNCE_BYTES, end), False
        else:
            first = min(round_up(offset), end)
            last = max(first, end // ALIGNMENT * ALIGNMENT)
            pieces = (offset, first, False), (first, last, True), (last, end, False)
            yield from (piece for piece in pieces if piece[0] < piece[1])

    def _read(self, part: memoryview, offset: int, needed: int) -> None:
        """Fill at least the first `needed` bytes of `part`."""
        done = 0
        while done < needed:
            try:
                count = self._read_some(part[done:], offset + done)
            except OSError as error:
                raise disk_error(self.path, error.errno, str(error), "cannot be read") from error
            if done + count < needed and self.direct:
                count -= count % ALIGNMENT
            if count == 0:
                raise FileError(
                    f"is cut off: {self.nbytes} bytes, {offset + needed} are needed", where=str(self.path),
                    fix="Fetch or write it again",
                )  # fmt: skip
            done += count
        self._forget()

    def _write(self, part: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(part):
                count = self._write_some(part[done:], offset + done)
                if self.direct:
                    count -= count % ALIGNMENT
                if count == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += count
            if not self.direct:
                os.fsync(self._file.fileno())  # the cache drops only what is on the disk
        except OSError as error:
            raise disk_error(self.path, error.errno, str(error)) from error
        self._forget()

    def _forget(self) -> None:
        """Have the cache drop what passed: the whole file, for it keeps large pages that a range cuts."""
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _read_some(self, part: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [part], offset)
        with self._lock:
            self._file.seek(offset)
            return int(self._file.readinto(part))

    def _write_some(self, part: memoryview, offset: int) -> int:
        if hasattr(os, "pwritev"):
            return os.pwritev(self._file.fileno(), [part], offset)
        with self._lock:
            self._file.seek(offset)
            return int(self._file.write(part))


def _file_system(folder: str | Path) -> str:
    """Its name, such as ext4; "" where it is not known."""
    place = Path(folder).resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""


def _bytes_of(view: Tensor | memoryview) -> memoryview:
    """The same memory as bytes."""
    if isinstance(view, Tensor):
        assert view.is_contiguous(), "a contiguous tensor"
        view = view.detach().view(-1).view(torch.uint8).numpy().data
    return view.cast("B")
