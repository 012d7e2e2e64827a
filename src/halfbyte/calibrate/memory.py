"""How much text a calibration can look at within a budget of memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.config import RunConfig
from halfbyte.data import TokenizedData, calibration_text
from halfbyte.dtypes import format_bytes
from halfbyte.errors import ResourceError
from halfbyte.model.memory import free_memory, matrix_sides, resident_memory
from halfbyte.model.side_by_side import padded_tokens
from halfbyte.plan import Budget, budget_of
from halfbyte.plan.merging import CHUNK_TOKENS, MEASURED_LENGTH, error_feedback_bytes, sensitivity_bytes, waiting_bytes

MOST_TOKENS, LEAST_TOKENS = 65_536, 512
"""Of text to calibrate on: fewer where memory does not suffice."""
USUAL_TOKENS, MOST_WORK = 16_384, 2**44
"""Of a larger model: more than these take part only while tokens times parameters stay below MOST_WORK. SmolLM2-135M
closes 79 % of the gap to 16 bits on 16,384 tokens and 88 % on 65,536 (docs/fidelity.md)."""
MOST_MEASURED, LEAST_MEASURED = 512, 128
"""Likewise, to measure on: 128 tokens rank the layers of SmolLM2-135M as 1,008 do (docs/formats.md)."""
LIBRARIES = 24_000_000
"""Bytes that they take when they first compute: 17 MB measured."""

Text = tuple[Tensor, Tensor]


def text_within(config: RunConfig, model: PreTrainedModel, data: TokenizedData) -> tuple[Text, int, int]:
    """As much of `data` as memory.budget, or the machine, has room for; how many tokens of it may wait inside a layer;
    and the bytes of the fullest moment.

    Raises:
        ResourceError: not even for LEAST_TOKENS; names the smallest budget that works.
    """

    def text_of(tokens: int) -> Text:
        rows = [torch.from_numpy(data[i].input_ids).long() for i in range(min(tokens // 16, len(data)))]
        return calibration_text(rows, tokens)

    def bytes_of(text: Text) -> int:
        return error_feedback_bytes(*matrix_sides(model), text[0].numel(), start=config.lora.init == "cloq")

    most = min(max(MOST_WORK // max(model.num_parameters(), 1), USUAL_TOKENS), MOST_TOKENS)
    text, needed, left = _most(config, text_of, bytes_of, most, LEAST_TOKENS)
    waiting = min(padded_tokens(*text, CHUNK_TOKENS), left // waiting_bytes(*matrix_sides(model), 1))
    return text, waiting, needed + waiting_bytes(*matrix_sides(model), waiting)


def measured_within(
    config: RunConfig, model: PreTrainedModel, data: TokenizedData, num_units: int
) -> tuple[Text, int]:
    """Ends of samples, for `num_units` copies of their hidden states; otherwise as `text_within`."""

    def text_of(tokens: int) -> Text:
        ends = [torch.from_numpy(data[i].input_ids[-MEASURED_LENGTH:]) for i in range(min(tokens // 16, len(data)))]
        return calibration_text([row.long() for row in ends], tokens)

    def bytes_of(text: Text) -> int:
        vocab = model.get_input_embeddings().weight.shape[0]
        return sensitivity_bytes(int(vocab), *matrix_sides(model), num_units, text[0].numel())

    return _most(config, text_of, bytes_of, MOST_MEASURED, LEAST_MEASURED)[:2]


def _most(
    config: RunConfig, text_of: Callable[[int], Text], bytes_of: Callable[[Text], int], most: int, least: int
) -> tuple[Text, int, int]:
    """The text, the bytes it needs, and those that the budget leaves."""
    resident, tokens = resident_memory(), most
    budget = budget_of(config) or Budget(resident + free_memory(), "this machine's free memory")
    while True:
        text = text_of(tokens)
        needed = resident + LIBRARIES + bytes_of(text)
        if needed <= budget.bytes:
            return text, needed, budget.bytes - needed
        if tokens == least:
            raise ResourceError(
                f"{format_bytes(budget.bytes)} are not enough to calibrate", where=budget.source,
                why=f"{least} tokens of text take {format_bytes(needed)}",
                fix=f"Give --memory {-(-needed // 10**6)}MB",
            )  # fmt: skip
        tokens //= 2
