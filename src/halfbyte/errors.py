"""Every error a user can meet, as one tree.

HalfbyteError                 what, where, why, what to do: one line; carries the exit code
├── ConfigError       (2)     a setting is unknown, out of range, or contradicts another one
├── FileError         (3)     a file or folder does not hold what its name says
│   ├── ModelError            base model: weights, config, tokenizer
│   ├── DataError             JSONL: names file and line
│   └── AdapterError          adapter folder
├── ResourceError     (4)     memory, disk, device, missing package
└── NumericsError     (5)     a NaN, a run that learns nothing, a result out of tolerance

Functions raise these for what a user did or has; `assert` is for what only a programmer can break.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


class HalfbyteError(Exception):
    """One line for the user: ``where: what: why. fix``.

    Args:
        what: what went wrong, without a full stop ("tensor has 3 NaN").
        where: the file, tensor, line or setting it concerns; may be empty.
        why: the cause, when it is not plain from `what`.
        fix: what the user can do about it, as a sentence without a full stop.
    """

    exit_code = 1
    said = False
    """Another process has said it: a second line would only repeat it."""

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        text = ": ".join(part for part in (where, what, why) if part)
        super().__init__(f"{text}. {fix}." if fix else text)


class ConfigError(HalfbyteError, ValueError):
    """A setting is unknown, out of range, or contradicts another one (exit 2)."""

    exit_code = 2


class FileError(HalfbyteError, ValueError):
    """A file or folder does not hold what its name says (exit 3)."""

    exit_code = 3


class ModelError(FileError):
    """A base model's weights, config or tokenizer cannot be used (exit 3)."""


class DataError(FileError):
    """Training or evaluation data cannot be used; names file and line (exit 3)."""


class AdapterError(FileError):
    """An adapter folder cannot be used, or belongs to another base (exit 3)."""


class ResourceError(HalfbyteError, RuntimeError):
    """The machine lacks memory, disk, a device or a package (exit 4)."""

    exit_code = 4


class NumericsError(HalfbyteError, ArithmeticError):
    """A value is not finite, nothing is learned, or a result is out of tolerance (exit 5)."""

    exit_code = 5


_DISK_FIXES = {
    errno.ENOSPC: "Free some space or choose another folder",
    errno.EDQUOT: "Free some of your quota or choose another folder",
    errno.EFBIG: "Raise the limit on file size (ulimit -f) or choose another folder",
    errno.EROFS: "Choose a folder on a disk that can be written",
    errno.EACCES: "Choose a folder you may write to",
    errno.EPERM: "Choose a folder you may write to",
    errno.EIO: "The disk reports an error: check it, or choose another folder",
}
DISK_ERRNOS = frozenset(_DISK_FIXES)
"""What a system call says when it is the disk that refuses."""


def disk_error(where: str | Path, code: int | None, text: str = "", what: str = "cannot be written") -> ResourceError:
    """The disk refused something at `where` with errno `code`; `text` is the reason where there is none."""
    fix = _DISK_FIXES.get(code or 0, "Check the disk, or choose another folder")
    return ResourceError(what, where=str(where), why=os.strerror(code) if code else text, fix=fix)


def read_error(kind: type[FileError], path: str | Path, error: OSError, fix: str = "") -> HalfbyteError:
    """Why a file cannot be read: its fault is an error of type `kind`, the machine's a ResourceError."""
    why = error.strerror or str(error)
    if error.errno in _NOT_THE_FILES:
        return ResourceError("cannot be read", where=str(path), why=why, fix=_NOT_THE_FILES[error.errno])
    return kind("cannot be read", where=str(path), why=why, fix=fix)


_NOT_THE_FILES = {
    errno.EIO: "The disk reports an error: check it, or use a copy elsewhere",
    errno.ESTALE: "The network drive has lost the file: mount it again",
    errno.ETIMEDOUT: "The network drive does not answer: try again",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.ENFILE: "The system has too many files open: close programs",
    errno.ENOMEM: "Free some memory",
}
