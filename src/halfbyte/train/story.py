"""All that a run has told so far: handed on as it comes, and kept for pages that are drawn while it goes on."""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

from halfbyte.checkpoint import versions
from halfbyte.checkpoint.manifest import read_json
from halfbyte.config import RunConfig, settings_of, to_dict
from halfbyte.data import tokens_of
from halfbyte.dtypes import format_bytes
from halfbyte.kernels.registry import cpu_choice
from halfbyte.model import inventory as groups
from halfbyte.plan import Plan
from halfbyte.report import Answer, RunReport, Shown
from halfbyte.train.gpu import peaks
from halfbyte.train.metrics import Metrics
from halfbyte.train.observer import Observer, Observers
from halfbyte.train.setup import Run
from halfbyte.train.trace import MemoryTrace

NUM_SAMPLES, MOST_TOKENS = 2, 400
"""Training samples that are shown token by token, and of each."""
LATELY = 20
"""Steps whose pace is that of those to come."""


_TERMS = {
    groups.LINEARS: "linears_4bit", groups.EMBEDDINGS: "embeddings", groups.HEAD: "head",
    groups.NORMS: "norms_and_other", groups.OTHER: "norms_and_other",
}  # fmt: skip
"""A loaded model's groups by the plan's names."""


class Story(Observers):
    """An observer between the run and `listener`, which hears all of it and is given this story first.

    Attributes:
        config: of the run; with the plan's choices once there is a plan.
        plan, run, metrics: None until they are made. answers: empty until they are.
        state: what it does now; "finished" at last.
        notes: as they were told.
    """

    def __init__(self, config: RunConfig, listener: Observer, trace: MemoryTrace, device: torch.device) -> None:
        super().__init__(listener)
        self.config, self.trace = config, trace
        self.plan: Plan | None = None
        self.run: Run | None = None
        self.metrics: Metrics | None = None
        self.answers: Sequence[Answer] = ()
        self.state = "prepare"
        self.notes: list[str] = []
        self._device = device
        self._began = time.time()
        self._samples: Sequence[Shown] = ()
        self.on_begin(self)

    def on_phase(self, name: str) -> None:
        self.state = name
        self.trace.enter(name)
        super().on_phase(name)

    def on_plan(self, config: RunConfig, plan: Plan) -> None:
        self.config, self.plan = config, plan
        super().on_plan(config, plan)

    def note(self, text: str) -> None:
        self.notes.append(text)
        super().note(text)

    def _shown(self) -> Sequence[Shown]:
        if self.run is not None and not self._samples:
            self._samples = _samples(self.run)
        return self._samples

    def report(self) -> RunReport:
        """What there is to say now."""
        config, run, done = self.config, self.run, self.state == "finished"
        steps = list(self.metrics.steps) if self.metrics else []
        lately = steps[-LATELY:]
        return RunReport(
            title=Path(config.model.path).name or config.model.path, state=self.state, started=self._began,
            seconds=self.trace.seconds, step=steps[-1].step if steps else 0, steps=run.steps if run else 0,
            loss=[(m.step, m.loss) for m in steps], lr=[(m.step, m.lr) for m in steps],
            held_out=list(self.metrics.evals) if self.metrics else [],
            speed=[(m.step, m.supervised_tokens / m.seconds) for m in steps],
            train_loss=self.metrics.train_loss() if self.metrics else None,
            tokens_per_s=self.metrics.rates()[0] if self.metrics and steps else None,
            step_seconds=sum(m.seconds for m in lately) / len(lately) if lately else None,
            memory=self.trace.points(), phases=list(self.trace.phases), plan=self.plan, peaks=dict(self.trace.peaks),
            peak=peaks(self._device)[1], measured=_measured(run) if run else {},
            samples=self._shown(), answers=self.answers, config=to_dict(config),
            defaults=to_dict(RunConfig()), facts=_facts(run) if done else {}, command=command_of(config),
            notes=list(self.notes),
        )  # fmt: skip


def command_of(config: RunConfig) -> str:
    """The shell command of this very run."""
    return shlex.join(["halfbyte", "train", *(word for s in settings_of(config) for word in ("--set", s))])


def _measured(run: Run) -> dict[str, int]:
    """Of a plan's terms those that are tensors one can count: the base, adapters, the optimizer's states."""
    found: dict[str, int] = {}
    for row in run.loaded.inventory.rows if run.loaded.store is None else ():
        name = _TERMS[row.group]
        found[name] = found.get(name, 0) + row.bytes
    found["adapters"] = sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
    if not run.config.optim.paged:
        states = (value for state in list(run.optimizer.state.values()) for value in state.values())
        found["optimizer_states"] = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    return found


def _samples(run: Run) -> list[Shown]:
    shown = []
    for index in range(min(NUM_SAMPLES, len(run.data))):
        example = run.data[index]
        targets = int((example.labels >= 0).sum())
        tokens = tokens_of(run.tokenizer, example)
        shown.append(Shown(int(run.data.lines[index]), len(tokens), targets, tokens[:MOST_TOKENS]))
    return shown


def _facts(run: Run | None) -> dict[str, dict[str, str]]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {
        "system": platform.platform(), "processor": _processor(), "kernels": cpu_choice().reason,
        "threads": str(torch.get_num_threads()), "memory": format_bytes(psutil.virtual_memory().total), "GPU": gpu,
    }  # fmt: skip
    found = {"Machine": machine, "Versions": {"python": platform.python_version(), **versions()}}
    if run is None:
        return found
    return {"SHA-256": {**run.hashes, **_adapter_hash(Path(run.config.train.output))}, **found}


def _adapter_hash(output: Path) -> Mapping[str, str]:
    """Of the finished adapter's weights."""
    manifest = output / "adapter" / "manifest.json"
    files = read_json(manifest)["files"] if manifest.exists() else {}
    return {name: str(entry["sha256"]) for name, entry in files.items() if name.endswith(".safetensors")}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
