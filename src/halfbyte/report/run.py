"""What there is to say of a run, while it goes on and when it is done: plain values, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from halfbyte.plan import Plan
from halfbyte.report.chart import Points

if TYPE_CHECKING:
    from halfbyte.data import Token

TERMS = {
    "linears_4bit": "quantized layers", "linears_16bit": "16-bit layers", "norms_and_other": "norms, biases, buffers",
    "runtime": "Python and libraries", "stream_ring": "buffers of streamed layers", "kv_cache": "keys and values",
    "activations_saved": "activations kept for the backward pass", "activations_temporary": "activations in passing",
}  # fmt: skip
"""A plan's terms in words, where their own name is not enough."""


@dataclass(frozen=True)
class Shown:
    """A training sample: the line of the file it is from, its tokens' number, and the first of them."""

    line: int
    tokens: int
    targets: int
    pieces: Sequence[Token]


@dataclass(frozen=True)
class Answer:
    """One prompt: what the data says, what the base says, what the tuned model says."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run so far; losses per supervised token, sizes in bytes, None where not known.

    Attributes:
        state: "finished", or what it does now.
        started: seconds since 1970. seconds: since then, of this process.
        steps: of the whole run. step: done.
        loss, held_out, lr, speed: over the steps; speed in supervised tokens a second.
        tokens_per_s: of all steps. step_seconds: of one, lately.
        memory: most in use over the seconds of this process. phases: (second, name) of what began when.
        plan: what was planned before the base was loaded.
        measured: of the plan's terms, those that can be measured alone.
        peaks: by the plan's phases, most in use.
        peak: most in use, by the system's own count.
        config: by section, with the plan's choices. defaults: to see what is not one.
        facts: name and text: hashes, versions, machine.
        command: what makes the run again.
        notes: the decisions as they were told.
    """

    title: str
    state: str
    started: float
    seconds: float
    step: int = 0
    steps: int = 0
    loss: Points = ()
    held_out: Points = ()
    lr: Points = ()
    speed: Points = ()
    train_loss: float | None = None
    tokens_per_s: float | None = None
    step_seconds: float | None = None
    memory: Points = ()
    phases: Sequence[tuple[float, str]] = ()
    plan: Plan | None = None
    measured: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    samples: Sequence[Shown] = ()
    answers: Sequence[Answer] = ()
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    command: str = ""
    notes: Sequence[str] = ()
