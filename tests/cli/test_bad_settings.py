"""Settings that cannot be, and machines that cannot do it: docs/refusals.md says what is said of each."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.refusals import check, promised

from halfbyte.checkpoint import locked

pytestmark = pytest.mark.filterwarnings("ignore")  # what the command line hides from users, it hides here
ARGUMENTS = ["train", "--model", "PLACE/model", "--data", "PLACE/data.jsonl", "--set", "data.max_seq_len=96"]
SETTINGS: dict[str, str] = {
    "a learning rate of 0": "optim.lr=0",
    "a negative learning rate": "optim.lr=-1",
    "a learning rate of 10^9": "optim.lr=1e9",
    "a learning rate that is NaN": "optim.lr=nan",
    "betas of 1": "optim.betas=[0.9, 1.0]",
    "rank 0": "lora.r=0",
    "a rank beyond the layers": "lora.r=97",
    "a rank beyond its limit": "--set=limits.rank=8",
    "alpha 0": "lora.lora_alpha=0",
    "dropout 1": "lora.dropout=1",
    "no such layer": "lora.target_modules=nope",
    "a batch of 0": "train.micro_batch_size=0",
    "steps of -1": "train.steps=-1",
    "more warm-up than steps": "optim.warmup_steps=1000",
    "more accumulation than samples": "train.gradient_accumulation_steps=1000",
    "a misspelt key": "optim.lrr=1",
    "a misspelt section": "optimm.lr=1",
    "an unknown key": "train.zebra=1",
    "a text for a number": "lora.r=many",
    "a block size that is no power of two": "quant.blocksize=48",
    "an unknown format": "quant.quant_type=nf5",
    "a budget in words": "memory.budget=plenty",
    "a limit of 0": "limits.rank=0",
    "a configuration that is not there": "--config=PLACE/none.toml",
    "a resume that is no checkpoint": "train.resume=PLACE/none",
}
Patch = pytest.MonkeyPatch
Stack = contextlib.ExitStack


def failing(name: str, number: int, module: Any = os) -> Callable[[Path, Patch, Stack], None]:
    """A function of the system that fails with this errno."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return lambda place, patch, stack: patch.setattr(module, name, fail)


def unreadable(place: Path, patch: Patch, stack: Stack) -> None:
    """The weights' file is on a disk that fails."""
    opened = open

    def open_(file: Any, *more: Any, **named: Any) -> Any:
        if str(file).endswith("model.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return opened(file, *more, **named)

    patch.setattr(io, "open", open_)
    patch.setattr(builtins, "open", open_)


def full(place: Path, patch: Patch, stack: Stack) -> None:
    """A disk with 5 kB free."""
    usage = namedtuple("usage", "total used free")
    patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))


def short_files(place: Path, patch: Patch, stack: Stack) -> None:
    """Files end at 20 kB, where one that is longer would be cut off."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)


def taken(place: Path, patch: Patch, stack: Stack) -> None:
    """Another process (another open file) holds the folder."""
    (place / "taken").mkdir()
    stack.enter_context(locked(place / "taken"))


MACHINES: dict[str, tuple[list[str], Callable[[Path, Patch, Stack], object]]] = {
    "the output is a file": (["--output", "PLACE/data.jsonl"], lambda p, patch, stack: None),
    "the output holds what is not ours": (["--output", "PLACE/other"], lambda p, patch, stack: [
        (p / "other" / "adapter").mkdir(parents=True), (p / "other" / "adapter" / "mine.txt").touch()
    ]),
    "another process trains into it": (["--output", "PLACE/taken"], taken),
    "the output cannot be made": (["--output", "/proc/nope"], lambda p, patch, stack: None),
    "the output is below a file": (["--output", "PLACE/data.jsonl/run"], lambda p, patch, stack: None),
    "the output's folder is not there": (["--output", "PLACE/no/run"], lambda p, patch, stack: None),
    "no room on the disk": ([], full),
    "the disk is full": ([], failing("fsync", errno.ENOSPC)),
    "the quota is used up": ([], failing("fsync", errno.EDQUOT)),
    "the disk fails": ([], failing("fsync", errno.EIO)),
    "the disk cannot be written": ([], failing("mkdir", errno.EROFS)),
    "files may not be as long": ([], short_files),
    "the weights cannot be read": ([], unreadable),
    "too little memory": (["--memory", "20MB"], lambda p, patch, stack: None),
    "a model that is not here": (["--model", "some/model"], lambda p, patch, stack: None),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = [SETTINGS[case]] if SETTINGS[case].startswith("--") else ["--set", SETTINGS[case]]
    check("settings", case, [*ARGUMENTS, "--output", "PLACE/out", *setting], place, capsys)


@pytest.mark.parametrize("case", MACHINES)
def test_machines(case: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, change = MACHINES[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        change(place, patch, stack)
        check("machines", case, [*ARGUMENTS, "--output", "PLACE/out", "--steps", "2", *arguments], place, capsys)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_the_page_shows_these() -> None:
    assert list(promised("settings")) == list(SETTINGS)
    assert list(promised("machines")) == list(MACHINES)
