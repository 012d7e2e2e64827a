"""Rows of a table that stays on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.store.direct_io import DirectFile
from halfbyte.store.layers import Extent


class RowStore:
    """A table's rows, read one by one when they are asked for.

    Args:
        extent: where the table lies.
        row_bytes: of one row.
    """

    def __init__(self, extent: Extent, row_bytes: int) -> None:
        self._file, self._start, self._row_bytes = DirectFile(extent.file), extent.start, row_bytes
        self._num_rows = (extent.end - extent.start) // row_bytes

    def read(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), row_bytes) uint8.

        Raises:
            IndexError: the table has no such row.
            FileError, ResourceError: the file cannot be read any more.
        """
        found = torch.empty(len(rows), self._row_bytes, dtype=torch.uint8)
        for place, row in enumerate(rows):
            if not 0 <= row < self._num_rows:
                raise IndexError(f"row {row} of a table of {self._num_rows}")
            self._file.read_into(found[place], self._start + row * self._row_bytes)
        return found
