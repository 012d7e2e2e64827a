"""What every format is handed, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from halfbyte.config import DataConfig
from halfbyte.merge.combine import Combine
from halfbyte.merge.feedback import Survived
from halfbyte.merge.fold import Fold
from halfbyte.merge.parts import Part
from halfbyte.merge.record import record
from halfbyte.model.lent import Weights
from halfbyte.model.load import Progress


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is merged, checked: nothing is wrong that could have been known.

    Attributes:
        fold: the base, and the weighted sum of the updates of `parts`.
        combine: how these become one adapter, where that is what is written.
    """

    fold: Fold
    base_sha256: str
    parts: tuple[Part, ...]
    tokenizer: Any
    data: DataConfig
    say: Callable[[str], None]
    output: Path = Path()
    gguf_type: str = "F16"
    combine: Combine = field(default_factory=Combine)

    def record(self, form: str, onto: str) -> dict[str, Any]:
        """What was merged on what."""
        return record(self.fold.base, self.base_sha256, self.parts, form=form, onto=onto)


@dataclass(frozen=True)
class Written:
    """What was written: `bytes` of tensors; its `weights`, read back; how to `use` it, for the model card; what else
    halfbyte.json is to say.
    """

    bytes: int
    weights: Weights
    use: str
    survived: tuple[Survived, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)


class Format(Protocol):
    """A format with its choices made.

    Attributes:
        form: its name and its numbers.
        max_drift: KL from base + adapter, nats per token, above which a merge is refused unless told otherwise.
        expected_bytes: about what the disk must have room for.
        work_bytes: of memory while it is written, beside a tensor.
        mapped_bytes: of its file while it is read back: pages of a mapped file count as resident.
    """

    form: str
    max_drift: float
    expected_bytes: int
    work_bytes: int
    mapped_bytes: int

    def write(self, fold: Fold, folder: Path, on_progress: Progress | None) -> Written: ...
