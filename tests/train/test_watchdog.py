"""The watchdog gives unused memory back, and stops a run before the system would; the rehearsal changes nothing."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from halfbyte.errors import ResourceError
from halfbyte.kernels.buffers import Buffers
from halfbyte.plan import Budget
from halfbyte.train import train, watchdog
from halfbyte.train.observer import Observer, StepMetrics
from halfbyte.train.rehearsal import rehearse
from halfbyte.train.setup import prepare
from halfbyte.train.watchdog import Watchdog

MakeRun = Any
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_unused_memory_is_given_back_before_the_budget_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, notes = Buffers(), Notes()
    monkeypatch.setattr(watchdog, "resident_memory", lambda: 900 + pool.resident)
    pool.empty((100_000,), torch.float32)  # dead at once
    with Watchdog(Budget(400_000, "memory.budget"), pool, notes) as dog:
        dog.start()
        wait_for(lambda: notes.texts)
    assert dog.trims >= 1
    assert pool.resident == 0
    assert "given back" in notes.texts[0]


def test_where_that_is_not_enough_the_ring_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, notes = [500, 500, 500], Notes()
    monkeypatch.setattr(watchdog, "resident_memory", lambda: 100_000 + sum(ring))
    with Watchdog(Budget(101_505, "memory.budget"), Buffers(), notes) as dog:
        dog.shrink = lambda: ring.pop() if len(ring) > 2 else 0
        dog.start()
        wait_for(lambda: notes.texts)
    assert len(ring) == 2
    assert "given back" in notes.texts[0]


def run_under(budget: int, error: type[BaseException] | None = None) -> None:
    with Watchdog(Budget(budget, "memory.budget"), Buffers(), Observer()) as dog:
        dog.start()
        if error is not None:
            raise error
        for _ in range(500):
            time.sleep(0.02)


def test_beyond_the_budget_the_run_ends_with_exit_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "resident_memory", lambda: 2_000_000)
    with pytest.raises(ResourceError, match=r"2\.0 MB are in use, 1\.0 MB are allowed") as stopped:
        run_under(1_000_000)
    assert stopped.value.exit_code == 4


def test_so_it_does_where_ctrl_c_is_ignored_and_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the background of a shell."""
    monkeypatch.setattr(watchdog, "resident_memory", lambda: 2_000_000)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(ResourceError, match="are allowed"):
            run_under(1_000_000)
    finally:
        signal.signal(signal.SIGINT, before)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ResourceError, match="are allowed"):
        pool.submit(run_under, 1_000_000).result()


def test_ctrl_c_stays_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_under(1 << 50, KeyboardInterrupt)


class Swells(Observer):
    """As if something beside the plan took 10 GB after the first step. Waits there for the watchdog: an interrupt that
    falls between a file's opening and its `with` would leave that file to the garbage collector, which warns."""

    resident = 0

    def on_step(self, metrics: StepMetrics) -> None:
        self.resident = 10**10
        for _ in range(500):
            time.sleep(0.02)


def test_a_run_that_takes_more_than_planned_is_stopped(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    observer = Swells()
    monkeypatch.setattr(watchdog, "resident_memory", lambda: observer.resident)
    with pytest.raises(ResourceError, match="stopped before the system"):
        train(make_run(memory__budget="6GB"), observer=observer)


def test_the_rehearsal_leaves_no_trace(make_run: MakeRun) -> None:
    """Parameters, gradients, moments and random states are what they were; dropout would show it."""
    run = prepare(make_run(lora__dropout=0.3, train__gradient_accumulation_steps=2), Observer())
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    random = torch.get_rng_state()
    with run.objective.ready():
        assert rehearse(run) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    for state in run.optimizer.state_dict()["state"].values():
        assert state["step"] == 0
        assert not state["exp_avg"].any()
