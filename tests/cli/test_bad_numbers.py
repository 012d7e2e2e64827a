"""Steps and merges that go wrong on the way, and signals: docs/refusals.md says what is said of each."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.refusals import Change, adapter_tensors, check, promised

from halfbyte.cli.main import main
from halfbyte.train import loop

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what the command line hides from users, it hides here
    pytest.mark.usefixtures("signals_of_a_terminal"),
]
TRAIN = [
    "train", "--model", "PLACE/model", "--data", "PLACE/data.jsonl", "--output", "PLACE/out", "--steps", "9",
    "--set", "data.max_seq_len=96", "--set", "train.save_every=1",
]  # fmt: skip
MERGE = ["merge", "--model", "PLACE/model", "--adapter", "PLACE/adapter", "--data", "PLACE/data.jsonl"]
OUT = ["--output", "PLACE/out"]


def _loss(*_: object) -> float:
    return math.nan


def _full_memory(*_: object) -> float:
    raise MemoryError


def _full_for_torch(*_: object) -> float:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried")


def _signalled(*numbers: int) -> Callable[..., float]:
    original = loop._accumulate_gradients

    def step(*arguments: Any) -> float:
        loss = original(*arguments)
        for number in numbers:
            os.kill(os.getpid(), number)
        return loss

    return step


STEPS: dict[str, Callable[..., float]] = {
    "losses that are not finite": _loss,
    "memory that runs out": _full_memory,
    "memory that runs out in torch": _full_for_torch,
    "Ctrl-C": _signalled(signal.SIGINT),
    "Ctrl-C twice": _signalled(signal.SIGINT, signal.SIGINT),
    "SIGTERM": _signalled(signal.SIGTERM),
    "SIGHUP": _signalled(signal.SIGHUP),
}
KEPT = {"Ctrl-C": 2, "Ctrl-C twice": 1, "SIGTERM": 2, "SIGHUP": 2, "losses that are not finite": 5}
"""The newest checkpoint after a good first step."""


def _merged(place: Path) -> None:
    arguments = [each.replace("PLACE", str(place)) for each in [*MERGE, "--output", "PLACE/merged"]]
    assert main(arguments) == 0


MERGES: dict[str, tuple[Change, list[str]]] = {
    "an output that is there": (
        lambda p: (p / "there").mkdir() or (p / "there/x").touch(), ["--output", "PLACE/there"]
    ),
    "an output in the model's folder": (lambda p: None, ["--output", "PLACE/model/out"]),
    "an unknown format to write": (lambda p: None, [*OUT, "--format", "8bit"]),
    "too little memory to merge": (lambda p: None, [*OUT, "--memory", "20MB"]),
    "a model that has the adapter already": (_merged, [*OUT, "--model", "PLACE/merged"]),
    "an update that no 16 bits hold": (
        adapter_tensors(lambda s: s.update({k: v.sign() * 1e25 for k, v in s.items()})), OUT
    ),
    "a result that is too far away": (lambda p: None, [*OUT, "--max-drift", "0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_steps(case: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = loop._accumulate_gradients, [0]

    def accumulate(*arguments: Any) -> float:
        calls[0] += 1
        return original(*arguments) if calls[0] == 1 else STEPS[case](*arguments)

    monkeypatch.setattr(loop, "_accumulate_gradients", accumulate)
    kept = KEPT.get(case, 1)
    names = {"metrics.jsonl", *(f"checkpoint-{step}" for step in range(max(kept - 1, 1), kept + 1))}
    check("steps", case, TRAIN, place, capsys, leaves=names)


@pytest.mark.parametrize("case", MERGES)
def test_merges(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, arguments = MERGES[case]
    change(place)
    check("merges", case, [*MERGE, *arguments], place, capsys)


def test_a_merge_on_a_full_disk(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    check("merges", "a full disk", [*MERGE, *OUT], place, capsys)
    assert sorted(path.name for path in place.iterdir()) == ["adapter", "data.jsonl", "model"]


def test_the_page_shows_these() -> None:
    assert list(promised("steps")) == list(STEPS)
    assert list(promised("merges")) == [*MERGES, "a full disk"]
