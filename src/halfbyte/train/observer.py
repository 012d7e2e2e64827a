"""What a run tells whoever watches it. The CLI draws it; a library user may ignore it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfbyte.config import RunConfig
    from halfbyte.plan import Plan
    from halfbyte.train.story import Story


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step."""

    step: int
    steps: int
    loss: float
    """Mean over the step's supervised tokens."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    supervised_tokens: int
    seconds: float
    memory: int
    """Resident bytes of the process after the step."""
    epoch: int


class Observer:
    """Does nothing; subclass what you want to see."""

    def on_begin(self, story: Story) -> None:
        """The run begins; `story` has at any time, for any thread, what there is to say of it."""

    def on_phase(self, name: str) -> None:
        """What it does from now on: prepare, load, train, evaluate, save or generate, as a plan's phases are named."""

    def on_plan(self, config: RunConfig, plan: Plan) -> None:
        """It fits: the plan, and the config with the plan's choices."""

    def note(self, text: str) -> None:
        """An automatic decision and its reason, or a fact worth knowing."""

    def load_progress(self, done: int, total: int, name: str) -> None:
        """`done` of `total` tensors of the base are in memory."""

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimizer step is done."""

    def eval_progress(self, done: int, total: int) -> None:
        """`done` of `total` evaluation samples are done."""

    def on_eval(self, step: int, loss: float) -> None:
        """Held-out loss per supervised token, after `step` steps."""

    def on_save(self, path: Path) -> None:
        """A checkpoint or the adapter is complete on disk."""


class Observers(Observer):
    """Tells several what it is told."""

    def __init__(self, *listeners: Observer) -> None:
        self.listeners = listeners

    def on_begin(self, story: Story) -> None:
        for listener in self.listeners:
            listener.on_begin(story)

    def on_phase(self, name: str) -> None:
        for listener in self.listeners:
            listener.on_phase(name)

    def on_plan(self, config: RunConfig, plan: Plan) -> None:
        for listener in self.listeners:
            listener.on_plan(config, plan)

    def note(self, text: str) -> None:
        for listener in self.listeners:
            listener.note(text)

    def load_progress(self, done: int, total: int, name: str) -> None:
        for listener in self.listeners:
            listener.load_progress(done, total, name)

    def on_step(self, metrics: StepMetrics) -> None:
        for listener in self.listeners:
            listener.on_step(metrics)

    def eval_progress(self, done: int, total: int) -> None:
        for listener in self.listeners:
            listener.eval_progress(done, total)

    def on_eval(self, step: int, loss: float) -> None:
        for listener in self.listeners:
            listener.on_eval(step, loss)

    def on_save(self, path: Path) -> None:
        for listener in self.listeners:
            listener.on_save(path)
