"""What a merge will hold at its fullest moment, before it starts."""

from __future__ import annotations

from halfbyte.config import RunConfig
from halfbyte.dtypes import format_bytes
from halfbyte.errors import ResourceError
from halfbyte.merge.base import MergeBase
from halfbyte.merge.drift import Probe
from halfbyte.merge.job import Format
from halfbyte.model.memory import matrix_sides, resident_memory
from halfbyte.plan import budget_of
from halfbyte.plan.merging import GROUP_TOKENS, drift_bytes, error_feedback_bytes


def predicted_peak(base: MergeBase, probe: Probe, format: Format) -> int:
    """Bytes: what is resident now, and the larger of measuring drift and what the format needs."""
    group = max(GROUP_TOKENS, max(map(len, probe.ids)))
    drift = drift_bytes(len(base.model.get_input_embeddings().weight), *matrix_sides(base.model), group)
    return resident_memory() + max(drift, format.work_bytes) + format.mapped_bytes


def text_bytes(base: MergeBase, rows: int) -> int:
    """Of codes chosen on `rows` tokens of text, padding included."""
    return error_feedback_bytes(*matrix_sides(base.model), rows)


def check_budget(config: RunConfig, needed: int) -> None:
    """See that `needed` bytes are within `memory.budget`, or what the container allows.

    Raises:
        ResourceError: they are not; names the smallest budget that works.
    """
    budget = budget_of(config)
    if budget is not None and needed > budget.bytes:
        raise ResourceError(
            f"{format_bytes(budget.bytes)} are not enough for this merge", where=budget.source,
            why=f"its fullest moment takes {format_bytes(needed)}", fix=f"Give --memory {-(-needed // 10**6)}MB",
        )  # fmt: skip
