"""What a merge will hold at its fullest moment, before it starts."""

from __future__ import annotations

from halfbyte.config import RunConfig
from halfbyte.dtypes import format_bytes
from halfbyte.errors import ResourceError
from halfbyte.merge.base import MergeBase
from halfbyte.merge.drift import Probe
from halfbyte.model.memory import resident_memory
from halfbyte.plan import budget_of
from halfbyte.plan.merging import GROUP_TOKENS, drift_bytes, error_feedback_bytes


def predicted_peak(base: MergeBase, probe: Probe, text_rows: int) -> int:
    """Bytes: what is resident now, and the larger of measuring drift and taking calibration text through the model.

    Args:
        text_rows: tokens of calibration text, padding included; 0 for a format that needs none.
    """
    shapes = [tuple(parameter.shape) for parameter in base.model.parameters()]
    vocabulary, width = base.model.get_input_embeddings().weight.shape
    matrices = [shape for shape in shapes if len(shape) == 2 and vocabulary not in shape]
    widest = max((max(shape) for shape in matrices), default=width)
    group = max(GROUP_TOKENS, max(map(len, probe.ids)))
    drift = drift_bytes(vocabulary, width, widest, group)
    text = error_feedback_bytes(width, widest, text_rows) if text_rows else 0
    return resident_memory() + max(drift, text)


def check_budget(config: RunConfig, needed: int) -> None:
    """See that `needed` bytes are within `memory.budget`, or what the container allows.

    Raises:
        ResourceError: they are not; names the smallest budget that works.
    """
    budget = budget_of(config)
    if budget is not None and needed > budget.bytes:
        raise ResourceError(
            f"{format_bytes(budget.bytes)} are not enough for this merge", where=budget.source,
            why=f"its fullest moment takes {needed} bytes", fix=f"Give --memory {-(-needed // 10**6)}MB",
        )  # fmt: skip
