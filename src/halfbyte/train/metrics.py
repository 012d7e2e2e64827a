"""The run's numbers: one JSON object a line in ``metrics.jsonl``, and sums over the run."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import write_file
from halfbyte.report.log import read_log
from halfbyte.train.observer import StepMetrics


class Metrics:
    """Appends to ``metrics.jsonl``; keeps what the final report needs.

    A resumed run drops lines past the checkpoint's step first, so that every step stands once.

    Args:
        write: False reads only, and keeps the file as it is: of several ranks one writes.

    Attributes:
        steps: metrics of the steps of the whole run, also those before a resume.
        steps_now: how many of them are not from before a resume.
        evals: (step, held-out loss).
    """

    def __init__(self, path: Path, *, first_step: int, write: bool = True) -> None:
        self.steps: list[StepMetrics] = []
        self.evals: list[tuple[int, float]] = []
        self.steps_now = 0
        # A fresh start keeps nothing, not even an evaluation before step 1: it may be of another model or data.
        kept = [line for line in read_log(path) if line["step"] < first_step] if first_step > 1 else []
        for line in kept:
            if line["event"] == "step":
                self.steps.append(StepMetrics(**{k: v for k, v in line.items() if k not in ("event", "time")}))
            elif line["event"] == "eval":
                self.evals.append((line["step"], line["eval_loss"]))
        if write:
            write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8") if write else None

    def add_step(self, metrics: StepMetrics) -> None:
        """Record a finished step."""
        self.steps.append(metrics)
        self.steps_now += 1
        self._write({"event": "step", **asdict(metrics), "time": time.time()})

    def add_skipped(self, step: int) -> None:
        """Record a step whose update was not finite and was left out."""
        self.steps_now += 1
        self._write({"event": "skipped", "step": step, "time": time.time()})

    def add_eval(self, step: int, loss: float) -> None:
        """Record an evaluation; ``step`` 0 is before training."""
        self.evals.append((step, loss))
        self._write({"event": "eval", "step": step, "eval_loss": loss, "time": time.time()})

    def rates(self) -> tuple[float, float]:
        """Tokens and supervised tokens a second over the training steps of the whole run."""
        seconds = max(sum(step.seconds for step in self.steps), 1e-9)
        tokens = sum(step.tokens for step in self.steps)
        return tokens / seconds, sum(step.supervised_tokens for step in self.steps) / seconds

    def best_rate(self, least: float) -> float | None:
        """Tokens a second of the fastest step of at least `least` tokens; None if there is none."""
        return max((step.tokens / step.seconds for step in self.steps if step.tokens >= least), default=None)

    def train_loss(self) -> float | None:
        """Loss per supervised token over the last tenth of the steps; None when the log of a finished run is lost."""
        last = self.steps[-max(len(self.steps) // 10, 1) :]
        tokens = sum(step.supervised_tokens for step in last)
        return sum(step.loss * step.supervised_tokens for step in last) / tokens if tokens else None

    def sync(self) -> None:
        """Before a checkpoint: what a power cut leaves of the log reaches as far as the checkpoint does."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
