"""A file's rows as JSON text, one at a time: JSON lines as they are, Parquet rows turned into them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from halfbyte.config.limits import limit
from halfbyte.errors import DataError, HalfbyteError, read_error

PARQUET_ROWS = 64
"""Decoded at a time."""


class Digest(Protocol):
    """What hashlib's hashes are."""

    def update(self, data: bytes, /) -> None:
        """Take `data` in."""


def json_rows(path: str, digest: Digest) -> Iterator[tuple[int, bytes]]:
    """(1-based row, bytes of its JSON object) of a .parquet file or of JSON lines; rows without anything are left out.

    A line longer than limits.line_bytes comes cut off, one byte over it. `digest` takes in the file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    return (_parquet_rows if Path(path).suffix == ".parquet" else _lines)(path, digest)


def _unreadable(path: str, error: OSError) -> HalfbyteError:
    return read_error(DataError, path, error, "Give a file of JSON lines or Parquet (docs/data.md has an example)")


def _lines(path: str, digest: Digest) -> Iterator[tuple[int, bytes]]:
    try:
        with Path(path).open("rb") as file:
            number, start, most = 0, True, limit("line_bytes")
            while chunk := file.readline(most + 1):
                digest.update(chunk)
                if start:
                    number += 1
                    if number == 1:
                        chunk = chunk.removeprefix(b"\xef\xbb\xbf")
                    if chunk.strip():
                        yield number, chunk
                start = chunk.endswith(b"\n")
    except OSError as error:
        raise _unreadable(path, error) from None


def _parquet_rows(path: str, digest: Digest) -> Iterator[tuple[int, bytes]]:
    """Columns that are null in a row are left out of it: a table has all columns in every row."""
    try:
        import pyarrow as arrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            "cannot be read",
            where=path,
            why="Parquet needs the package pyarrow",
            fix="Run: pip install halfbyte[parquet]",
        ) from None  # fmt: skip
    number = 0
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            for batch in ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    given = {key: value for key, value in row.items() if value is not None}
                    yield (
                        number,
                        json.dumps(given, ensure_ascii=False, default=_refuse).encode("utf-8", "surrogatepass"),
                    )
    except arrow.ArrowException as error:
        why = str(error).splitlines()[0]
        raise DataError("not a Parquet file that can be read", where=path, why=why) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except TypeError as error:
        raise DataError("a value that JSON has no word for", where=f"{path}:{number}", why=str(error)) from None


def _refuse(value: Any) -> Any:
    raise TypeError(f"it is of type {type(value).__name__}")
