"""How much text a calibration can look at within a budget of memory."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.config import RunConfig
from halfbyte.data import TokenizedData, calibration_text
from halfbyte.dtypes import format_bytes
from halfbyte.errors import ResourceError
from halfbyte.model.memory import free_memory, matrix_sides, resident_memory
from halfbyte.plan import Budget, budget_of
from halfbyte.plan.merging import error_feedback_bytes

MOST_TOKENS, LEAST_TOKENS = 16_384, 512
"""Of text to calibrate on: fewer where memory does not suffice."""


def text_within(config: RunConfig, model: PreTrainedModel, data: TokenizedData) -> tuple[tuple[Tensor, Tensor], int]:
    """As much of `data` as memory.budget, or the machine, has room for, and the bytes of the fullest moment.

    Raises:
        ResourceError: not even for LEAST_TOKENS; names the smallest budget that works.
    """
    resident, tokens = resident_memory(), MOST_TOKENS
    budget = budget_of(config) or Budget(resident + free_memory(), "this machine's free memory")
    while True:
        rows = [torch.from_numpy(data[i].input_ids).long() for i in range(min(tokens // 16, len(data)))]
        text = calibration_text(rows, tokens)
        needed = resident + error_feedback_bytes(*matrix_sides(model), text[0].numel())
        if needed <= budget.bytes:
            return text, needed
        if tokens == LEAST_TOKENS:
            raise ResourceError(
                f"{format_bytes(budget.bytes)} are not enough to calibrate", where=budget.source,
                why=f"{LEAST_TOKENS} tokens of text take {needed} bytes", fix=f"Give --memory {-(-needed // 10**6)}MB",
            )  # fmt: skip
        tokens //= 2
