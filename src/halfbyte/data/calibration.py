"""A little text to calibrate on."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import torch
from torch import Tensor


def calibration_text(rows: list[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """About the first `tokens` tokens of samples: at least one, and none beyond twice their mean length, for a few
    long ones would make much padding.

    Args:
        rows: the samples, (tokens,) int64 each.

    Returns:
        ids (sequences, tokens) int64, padded at the end, and which of them are text.
    """
    rows = [row[: 2 * sum(map(len, rows)) // len(rows)] for row in rows]
    sizes = list(accumulate(map(len, rows)))
    rows = rows[: max(bisect_right(sizes, tokens), 1)]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([torch.ones(len(row)).bool() for row in rows], batch_first=True)
