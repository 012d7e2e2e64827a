"""An update that is not finite is left out; several in a row end the run."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from halfbyte.checkpoint import latest_checkpoint
from halfbyte.errors import NumericsError
from halfbyte.optim import clip_grad_norm
from halfbyte.train.observer import Observer

PATIENCE = 5
"""Updates in a row that may be left out; one bad sample is one."""


class Guard:
    """Counts the updates that were left out.

    Attributes:
        skipped: how many, in all.
    """

    def __init__(self, observer: Observer, output: Path) -> None:
        self._observer, self._output = observer, output
        self._in_a_row = 0
        self.skipped = 0

    def gradient_norm(self, model: nn.Module, step: int, loss: float, max_norm: float) -> float | None:
        """Clip the gradients to `max_norm`; their norm before, or None: the loss or they are not finite, no update.

        Raises:
            NumericsError: the fifth in a row.
        """
        problem = f"the loss is {loss}"
        if math.isfinite(loss):
            try:
                norm = clip_grad_norm(model.parameters(), max_norm)
            except NumericsError as error:
                problem = error.what
            else:
                self._in_a_row = 0
                return norm
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == PATIENCE:
            good = latest_checkpoint(self._output)
            raise NumericsError(
                problem, where=f"step {step}", why=f"{PATIENCE} updates in a row were not finite",
                fix="Lower optim.lr, or look for the samples that cause it; "
                + (f"{good} is good and holds none of these updates" if good else "no checkpoint was saved before"),
            )  # fmt: skip
        self._observer.note(f"step {step} changed nothing: {problem}; {PATIENCE} such steps in a row end the run")
        return None
