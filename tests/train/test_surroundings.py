"""A run among adverse circumstances: odd paths, nobody who reads its output, no temporary folder, other clocks."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte.checkpoint import latest_checkpoint
from halfbyte.config import RunConfig
from halfbyte.train import Observer, train

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
MakeRun = Callable[..., RunConfig]
ODD = "a b\nä $(touch ran) '\"; -- "


def command(config: RunConfig, output: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "halfbyte", "train", "--model", str(config.model.path), "--data", str(config.data.train),
        "--output", str(output), "--steps", "2", "--set", "data.max_seq_len=160", *more,
    ]  # fmt: skip


def adapter_bytes(output: Path | str) -> bytes:
    return (Path(output) / "adapter" / "adapter_model.safetensors").read_bytes()


def test_odd_paths_a_foreign_locale_and_no_temporary_folder(make_run: MakeRun, tmp_path: Path) -> None:
    """The same bytes; nothing of the path is run by a shell, and nothing is written elsewhere."""
    config, here, there = make_run(), tmp_path / "plain", tmp_path / ODD / ODD
    there.parent.mkdir()
    subprocess.run(command(config, here), check=True, capture_output=True)
    names = {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8", "TZ": "Asia/Kathmandu", "TMPDIR": "/proc/none"}
    subprocess.run(command(config, there), check=True, capture_output=True, env={**os.environ, **names}, cwd=tmp_path)
    assert adapter_bytes(there) == adapter_bytes(here)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", ODD}


def test_nobody_reads_its_output(make_run: MakeRun, tmp_path: Path) -> None:
    """Standard input and the readers of both outputs go away at once: the run is done all the same, exit 141."""
    output = tmp_path / "out"
    process = subprocess.Popen(
        command(make_run(), output), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 141
    assert adapter_bytes(output)


def test_a_clock_that_runs_backwards(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is named, ordered or found by the time."""
    plain, other = make_run("plain", train__save_every=2), make_run("other", train__save_every=2)
    train(plain)
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    train(other)
    newest = latest_checkpoint(other.train.output)
    assert newest is not None
    assert newest.name == "checkpoint-6"
    assert adapter_bytes(other.train.output) == adapter_bytes(plain.train.output)


def test_a_file_system_without_locks(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    config = make_run()
    train(config)
    assert adapter_bytes(config.train.output)


def test_other_threads_are_said_when_a_run_goes_on(make_run: MakeRun) -> None:
    class Notes(Observer):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    train(make_run(train__steps=2, train__save_every=2))
    threads, observer = torch.get_num_threads(), Notes()
    try:
        torch.set_num_threads(threads + 1)
        train(make_run(train__steps=3, train__save_every=2), observer=observer)
    finally:
        torch.set_num_threads(threads)
    assert f"not bit-exact with the first part of the run: threads {threads} -> {threads + 1}" in observer.notes
