"""llama.cpp's 4- and 5-bit blocks with codes of our own choice: gguf's scales, error feedback over their grid."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.quant.error_feedback import ranks_with_feedback
from halfbyte.quant.moments import Moments
from halfbyte.quant.on_grid import Grid

BLOCK = 32
_LOWEST = {"Q4_0": -8, "Q4_1": 0, "Q5_0": -16, "Q5_1": 0}
TYPES = tuple(_LOWEST)
"""A value is ``d * (code + lowest)``, of Q4_1 and Q5_1 plus a minimum; d and minimum are float16."""


def blocks_with_feedback(target: Tensor, moments: Moments, kind: str) -> NDArray[np.uint8]:
    """The bytes (out, bytes of a row) of W for which x W^T is close to t target^T.

    Args:
        target: (out, in) float32; in a multiple of 32.
        kind: one of TYPES.
    """
    plain: NDArray[np.uint8] = quantize(target.numpy(), gguf.GGMLQuantizationType[kind])
    blocks = plain.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    count = 16 if kind[1] == "4" else 32
    levels = torch.arange(count, dtype=torch.float32) + _LOWEST[kind]
    rows = len(target)
    offsets = _numbers(blocks[:, 2:4], rows) if kind.endswith("_1") else None
    ranks = ranks_with_feedback(moments.wanted(target), moments, Grid(levels, _numbers(blocks[:, :2], rows), offsets))
    codes = ranks.contiguous().numpy().reshape(-1, 2, BLOCK // 2)
    blocks[:, -16:] = (codes[:, 0] & 15) | (codes[:, 1] & 15) << 4
    if count == 32:
        blocks[:, -20:-16] = np.packbits(codes.reshape(-1, BLOCK) >> 4, axis=-1, bitorder="little")
    return plain


def _numbers(half: NDArray[np.uint8], rows: int) -> Tensor:
    """A float16 of each block: (rows, blocks) float32."""
    values = np.ascontiguousarray(half).view(np.float16).astype(np.float32)
    return torch.from_numpy(values).view(rows, -1)
