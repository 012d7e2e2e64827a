"""An embedding whose table stays on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.quant.int8 import dequantize_int8, quantize_int8

AT_ONCE = 64
"""Rows that take their int8 values at a time."""


class Rows(Protocol):
    """What reads the table: `store.RowStore`."""

    def read(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), row_bytes) uint8."""
        ...


class RowEmbedding(nn.Module):
    """nn.Embedding, frozen, over rows that are read when they are looked up: a batch's own, each once.

    Args:
        rows: the table's.
        num_embeddings, embedding_dim: its shape; what the table on disk does not have of it is in memory, zeros.
        stored: rows of the table on disk.
        dtype: that the table is stored in.
        compute_dtype: of what comes out.
        int8: give rows the values that an `Int8Embedding` has.
    """

    def __init__(
        self, rows: Rows, num_embeddings: int, embedding_dim: int, dtype: torch.dtype, compute_dtype: torch.dtype, *,
        int8: bool = False, stored: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._stored = num_embeddings if stored is None else stored
        self._more = torch.zeros(num_embeddings - self._stored, embedding_dim, dtype=dtype)
        self._rows, self.num_embeddings, self.embedding_dim = rows, num_embeddings, embedding_dim
        self._dtype, self._compute_dtype, self._int8 = dtype, compute_dtype, int8

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., embedding_dim) in the compute dtype."""
        unique, places = ids.unique(return_inverse=True)  # in order
        table = self.rows_of(unique)
        return F.embedding(places, table.to(places.device)).to(self._compute_dtype)

    def rows_of(self, ids: Tensor) -> Tensor:
        """(n,) int64 -> (n, embedding_dim) in the dtype of the table, a copy."""
        table = torch.empty(len(ids), self.embedding_dim, dtype=self._dtype)
        own = (ids < self._stored).cpu()
        table[own] = self._rows.read(ids.cpu()[own].tolist()).view(self._dtype)
        table[~own] = self._more[ids.cpu()[~own] - self._stored]
        for few in table.split(AT_ONCE) if self._int8 else ():
            few.copy_(dequantize_int8(*quantize_int8(few), self._dtype))
        return table

    def set_rows(self, ids: Tensor, values: Tensor) -> None:
        """Set rows (n,) int64 that are not on disk to `values` (n, embedding_dim)."""
        self._more[ids - self._stored] = values.to(self._dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, on disk in {str(self._dtype).removeprefix('torch.')}"
