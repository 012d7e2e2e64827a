"""A standard 16-bit model folder out of a base and an adapter, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.checkpoint.shard_writer import Pieces
from halfbyte.errors import NumericsError
from halfbyte.merge.base import MergeBase
from halfbyte.merge.update import Updates, folded_slices
from halfbyte.model.load import Progress
from halfbyte.model.read import SLICE_ELEMENTS

Named = Iterator[tuple[str, Tensor | Pieces]]


def merged_tensors(
    base: MergeBase, updates: Updates, dtype: torch.dtype, on_progress: Progress | None = None
) -> Named:
    """Every tensor of the merged model for `write_shards`: 4-bit layers decoded, with their update, in `dtype`;
    all others as they are stored, unless the adapter changes them.

    Raises:
        NumericsError: a merged weight is beyond the range of `dtype`; names it.
    """
    for done, name in enumerate(base.names):
        if on_progress:
            on_progress(done, len(base.names), name)
        if name in base.targets:
            yield name, _merged(base, updates, name, dtype)
        else:
            yield name, merged_unquantized(base, updates, name)


def merged_unquantized(base: MergeBase, updates: Updates, name: str) -> Tensor:
    """Parameter `name`, which training holds as it is stored, with its update if it has one."""
    stored = base.unquantized(name)
    if name not in updates:
        return stored
    update = updates[name]
    added = stored.float() + (update.rows().T if base.is_transposed(name) else update.rows())
    return rounded(added, stored.dtype, name)


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
            why=f"the largest is {float(values.abs().max()):.3g}", fix="Use a base in bfloat16",
        )  # fmt: skip
    return result


def _merged(base: MergeBase, updates: Updates, name: str, dtype: torch.dtype) -> Pieces | Tensor:
    weight = base.quantized(name)
    slices = folded_slices(weight, updates.get(name), SLICE_ELEMENTS)
    parts = (rounded(part, dtype, name) for part in slices)
    if base.is_transposed(name):
        return torch.cat(list(parts)).T.contiguous()
    return Pieces(dtype, weight.shape, parts)
