"""The tables of `quant.codebook` on a device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from halfbyte.quant.codebook import (
    Codebook,
    codebook,
    dynamic_boundaries,
    dynamic_map,
    unsigned_dynamic_boundaries,
    unsigned_dynamic_map,
)


@cache
def device_tables(quant_type: str, blocksize: int, device: torch.device) -> tuple[Codebook, Tensor]:
    """The codebook and the dynamic map on `device`; kept, because each upload would wait for the GPU."""
    table = codebook(quant_type, blocksize)
    moved = replace(
        table, values=table.values.to(device), boundaries=table.boundaries.to(device), order=table.order.to(device)
    )
    return moved, dynamic_map().to(device)


@cache
def adamw_tables(device: torch.device) -> tuple[Tensor, ...]:
    """Values and boundaries of the first moments' map, then of the second moments', on `device`."""
    tables = (dynamic_map(), dynamic_boundaries(), unsigned_dynamic_map(), unsigned_dynamic_boundaries())
    return tuple(table.to(device) for table in tables)
