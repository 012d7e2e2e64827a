"""The terminal's view of a run, and who gets one."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from halfbyte.cli.live import LiveView, curve, view
from halfbyte.cli.progress import PlainLines
from halfbyte.cli.watching import watched
from halfbyte.config import RunConfig, load_config
from halfbyte.data import Token
from halfbyte.report import Answer, RunReport
from halfbyte.report.run import Shown
from halfbyte.train import Observers, train

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

RUN = RunReport(
    title="[b]model[/b]", state="train", started=1.7e9, seconds=75.0, step=3, steps=9,
    loss=[(1, 4.0), (2, 3.5), (3, 3.0)], held_out=[(0, 4.0), (3, 3.0)], speed=[(1, 50.0), (3, 60.0)],
    tokens_per_s=200.0, step_seconds=10.0, memory=[(1.0, 10**9)], peak=2 * 10**9,
    answers=[Answer("What\nfollows \x1b[31m[b]3?", "4", "3", "[b]Four.\x1b[2J")],
)  # fmt: skip


def drawn(run: RunReport, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(view(run, "2 of 8 held-out samples"))
    return out.getvalue()


def test_what_it_shows() -> None:
    text = drawn(RUN)
    for words in (
        "[b]model[/b] · train · 1 min 15 s", "3 of 9, 1 min 00 s left", "3.0000 in the last step",
        "3.0000 after 3 steps, -25.0% since the first", "200 tokens/s, 60 learned in the last step", "1.0 GB",
        "What follows", "[b]Four.", "2 of 8 held-out samples",
    ):  # fmt: skip
        assert words in text, words
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 20


def test_until_there_are_answers_it_shows_a_sample() -> None:
    pieces = [Token("What\\x1b ", False, False), Token("follows⏎\n3?", False, False), Token("Four", True, False)]
    text = drawn(replace(RUN, answers=[], samples=[Shown(line=1, tokens=3, targets=1, pieces=pieces)]))
    assert "a sample  …What\\x1b follows 3?Four" in text
    assert "a sample" not in drawn(RUN)


@pytest.mark.parametrize("width", [30, 60, 200])
def test_any_width(width: int) -> None:
    assert max(map(len, drawn(RUN, width).splitlines())) <= width


def test_before_anything_is_known() -> None:
    assert "model" in drawn(RunReport(title="model", state="prepare", started=0.0, seconds=0.0))


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [5.0, 4.0, 3.0, 2.0], [float("nan"), 1.0], [1.0, float("inf")]])
def test_a_curve_fills_its_columns(values: list[float]) -> None:
    lines = curve(values, 20, 4)
    assert [len(line) for line in lines] == [20] * 4
    for column in zip(*lines, strict=True):
        assert any(character != "\u2800" for character in column)


def test_a_falling_curve_falls() -> None:
    lines = curve([4.0, 3.0, 2.0, 1.0], 8, 4)
    first = [next(i for i, line in enumerate(lines) if line[x] != "\u2800") for x in range(8)]
    assert first == sorted(first)
    assert (first[0], first[-1]) == (0, 3)


def listeners(run: RunConfig, **console: Any) -> list[str]:
    with watched(run, Console(file=io.StringIO(), **console)) as observer:
        assert isinstance(observer, Observers)
        return [type(each).__name__ for each in observer.listeners]


def test_who_gets_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert listeners(load_config(), force_terminal=True) == ["LiveView", "Recorded"]
    assert listeners(load_config(), force_terminal=False) == ["PlainLines", "Recorded"]
    assert listeners(load_config(log__progress="plain"), force_terminal=True) == ["PlainLines", "Recorded"]
    assert listeners(load_config(log__progress="live"), force_terminal=False) == ["LiveView", "Recorded"]
    assert listeners(load_config(log__progress="none"), force_terminal=True) == ["Recorded"]
    monkeypatch.setenv("TERM", "dumb")
    assert listeners(load_config(), force_terminal=True) == ["PlainLines", "Recorded"]


def test_a_run_is_drawn(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    run = load_config(
        model__path=str(tiny_llama), data__train=str(chat_file), train__output=str(tmp_path / "run"), train__steps=3,
        lora__r=2, data__max_seq_len=96,
    )  # fmt: skip
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with LiveView(console) as observer:
        train(run, observer=observer)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert f"{tiny_llama.name} · " in text
    assert "fresh start" in text
    assert "saved" in text


def test_plain_lines_say_the_same(tmp_path: Path) -> None:
    out = io.StringIO()
    lines = PlainLines(Console(file=out))
    lines.note("[b]as it is[/b]")
    lines.on_eval(3, 1.5)
    assert "[b]as it is[/b]" in out.getvalue()
    assert "held-out loss after 3 steps: 1.5000" in out.getvalue()
    assert drawn(replace(RUN, loss=()))
