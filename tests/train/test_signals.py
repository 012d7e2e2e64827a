"""A run ends when it is asked to, with a checkpoint from which it goes on to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.checkpoint import locked
from halfbyte.config import RunConfig
from halfbyte.errors import ConfigError
from halfbyte.train import Observer, StepMetrics, train
from halfbyte.train.signals import Signals, StoppedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("signals_of_a_terminal"),
]
MakeRun = Callable[..., RunConfig]


class SignalAt(Observer):
    """Sends this process signals: when step `step` is done, or while what follows it is evaluated."""

    def __init__(self, step: int, *numbers: int, in_eval: bool = False) -> None:
        self._step, self._numbers, self._in_eval = step, numbers, in_eval
        self.done = 0
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def on_step(self, metrics: StepMetrics) -> None:
        self.done = metrics.step
        if not self._in_eval:
            self._send()

    def eval_progress(self, done: int, total: int) -> None:
        if self._in_eval:
            self._send()

    def _send(self) -> None:
        if self.done == self._step:
            for number in self._numbers:
                os.kill(os.getpid(), number)


def checkpoints(config: RunConfig) -> set[str]:
    return {path.name for path in Path(config.train.output).glob("checkpoint-*")}


def adapter_bytes(config: RunConfig) -> bytes:
    return (Path(config.train.output) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("save_every", [0, 3])
def test_the_first_signal_ends_after_the_step_with_a_checkpoint(
    make_run: MakeRun, number: int, save_every: int
) -> None:
    whole, cut = (make_run(name, train__save_every=save_every, lora__dropout=0.2) for name in ("whole", "cut"))
    train(whole)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    observer = SignalAt(2, number)
    with pytest.raises(StoppedError) as stopped:
        train(cut, observer=observer)
    assert stopped.value.signal == number
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert any("ending after this step" in note for note in observer.notes)
    assert (observer.done, checkpoints(cut)) == (2, {"checkpoint-2"})
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)


def test_the_second_signal_ends_at_once(make_run: MakeRun) -> None:
    cut = make_run("cut", train__save_every=1)
    with pytest.raises(StoppedError):
        train(cut, observer=SignalAt(3, signal.SIGINT, signal.SIGINT))
    assert checkpoints(cut) == {"checkpoint-1", "checkpoint-2"}
    whole = make_run("whole", train__save_every=1)
    train(whole)
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)


def test_an_evaluation_is_cut_short_and_the_steps_are_kept(make_run: MakeRun, eval_file: Path) -> None:
    settings = {"data__eval": str(eval_file), "train__eval_every": 2}
    whole, cut = make_run("whole", **settings), make_run("cut", **settings)
    expected = train(whole)
    with pytest.raises(StoppedError):
        train(cut, observer=SignalAt(4, signal.SIGTERM, in_eval=True))
    assert checkpoints(cut) == {"checkpoint-4"}
    lines = [json.loads(line) for line in (Path(cut.train.output) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0, 2]
    assert train(cut).eval_loss == expected.eval_loss
    assert adapter_bytes(cut) == adapter_bytes(whole)


def test_usr1_saves_and_the_run_goes_on(make_run: MakeRun) -> None:
    whole, other = make_run("whole"), make_run("other")
    train(whole)
    train(other, observer=SignalAt(2, signal.SIGUSR1))
    assert (checkpoints(whole), checkpoints(other)) == (set(), {"checkpoint-2"})
    assert adapter_bytes(other) == adapter_bytes(whole)


def test_a_signal_before_the_steps_ends_at_once() -> None:
    with Signals(Observer()), pytest.raises(StoppedError):
        signal.raise_signal(signal.SIGTERM)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals(Observer()) as signals:
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.ending is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_says_what_is_kept(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run("cut")
    command = [
        sys.executable, "-m", "halfbyte", "train", "--model", str(config.model.path), "--data", str(config.data.train),
        "--output", config.train.output, "--steps", "100000", "--set", "data.max_seq_len=160",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = Path(config.train.output) / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    (name,) = checkpoints(config)
    assert process.returncode == 143
    assert said == f"halfbyte: interrupted: the same command goes on from {config.train.output}/{name}"


def test_one_process_at_a_time(make_run: MakeRun) -> None:
    config = make_run()
    output = Path(config.train.output)
    with locked(output):
        with pytest.raises(ConfigError, match="another process is training into this folder"):
            train(config)
        assert list(output.iterdir()) == []
    train(config)
