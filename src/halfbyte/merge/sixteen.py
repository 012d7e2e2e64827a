"""A standard 16-bit model folder out of a base and an adapter, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.checkpoint.shard_writer import Pieces
from halfbyte.errors import NumericsError
from halfbyte.merge.fold import Fold
from halfbyte.model.load import Progress
from halfbyte.model.read import SLICE_ELEMENTS

Named = Iterator[tuple[str, Tensor | Pieces]]


def merged_tensors(fold: Fold, dtype: torch.dtype, on_progress: Progress | None = None) -> Named:
    """Every tensor of the merged model for `write_shards`: the weights that training holds in 4 bits in `dtype`, all
    others as they are stored.

    Raises:
        NumericsError: a merged weight is beyond the range of its dtype; names it.
    """
    names = fold.base.names
    for done, name in enumerate(names):
        if on_progress:
            on_progress(done, len(names), name)
        values = _merged(fold, name, dtype) if name in fold.base.targets else kept(fold, name)
        yield fold.base.file_name(name), values


def kept(fold: Fold, name: str) -> Tensor:
    """Parameter `name`, which training holds as it is stored, in that dtype."""
    return rounded(fold.unquantized(name), fold.base.reader.dtype(fold.base.names[name]), name)


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`values` in `dtype`.

    Raises:
        NumericsError: some are beyond its range.
    """
    result = values.to(dtype)
    if not result.isfinite().all():
        count = int((~result.isfinite()).sum())
        raise NumericsError(
            f"{count} values do not fit {str(dtype).removeprefix('torch.')}", where=name,
            why=f"the largest is {float(values.abs().max()):.3g}",
            fix="Use a base in bfloat16" if dtype == torch.float16 else "No 16 bits hold that: check the adapter",
        )  # fmt: skip
    return result


def _merged(fold: Fold, name: str, dtype: torch.dtype) -> Pieces | Tensor:
    parts = (rounded(part, dtype, name) for part in fold.slices(name, SLICE_ELEMENTS))
    if fold.base.is_transposed(name):
        return torch.cat(list(parts)).T.contiguous()
    return Pieces(dtype, tuple(fold.base.model.get_parameter(name).shape), parts)
