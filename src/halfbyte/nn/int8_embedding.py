"""An embedding whose table is held in int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from halfbyte.quant.int8 import dequantize_int8


class Int8Embedding(nn.Embedding):
    """nn.Embedding, frozen, over int8 codes with scales: the rows that are looked up are decoded.

    Args:
        weight, scales: as `quantize_int8` gives them; the output head may share them.
        lookup: the embedding in whose place it stands. A subclass of nn.Embedding computes the rows' values itself.
        dtype: that the table is stored in, to which rows are decoded.
        compute_dtype: of what comes out.
    """

    scales: Tensor

    def __init__(
        self,
        weight: nn.Parameter,
        scales: Tensor,
        lookup: nn.Embedding,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = weight
        self.register_buffer("scales", scales, persistent=False)
        self._lookup: nn.Embedding | None = None
        if type(lookup) is not nn.Embedding:
            lookup.weight = nn.Parameter(weight.new_empty((0, weight.shape[1]), dtype=dtype), requires_grad=False)
            lookup.padding_idx = None  # a row of the table, which it will not have
            self._lookup = lookup
        self._dtype, self._compute_dtype = dtype, compute_dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., embedding_dim) in the compute dtype."""
        rows = self.rows_of(ids)
        if self._lookup is not None:
            places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
            rows = functional_call(self._lookup, {"weight": rows.flatten(0, -2)}, (places,))
        return rows.to(self._compute_dtype)

    def rows_of(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., embedding_dim) in the dtype of the table, a copy."""
        return dequantize_int8(self.weight[ids], self.scales[ids], self._dtype)
