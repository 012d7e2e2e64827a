"""`halfbyte runs`: every run is listed as it ended, and nothing that is wrong with the list stops a run."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.main import main
from halfbyte.config import load_config, to_dict
from halfbyte.report import RunReport
from halfbyte.report.runs import Runs, StoreError

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

RUN = RunReport(
    title="m", state="train", started=1.7e9, seconds=60.0, step=2, steps=4, loss=[(1, 3.0), (2, 2.0)],
    held_out=[(0, 4.0), (2, 3.5)], memory=[(1.0, 5e8)], train_loss=2.0, peak=10**9, config=to_dict(load_config()),
)  # fmt: skip
OTHER = replace(RUN, config=to_dict(load_config(lora__r=8, optim__lr=1e-3)))


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of runs of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "halfbyte" / "runs.sqlite"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return result


def command(tiny_llama: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(tiny_llama), "--data", str(data), "--output", str(output), "--steps", "3",
        "--set", "lora.r=2", "--set", "data.max_seq_len=96", *more,
    ]  # fmt: skip


def test_a_run_is_listed_with_its_figures(
    state: Path, tiny_llama: Path, chat_file: Path, eval_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "runs") == {"runs": []}
    assert not state.exists()
    result = said(capsys, *command(tiny_llama, chat_file, tmp_path / "a", "--eval-data", str(eval_file)))
    (listed,) = said(capsys, "runs")["runs"]
    assert listed["state"] == "finished"
    assert listed["output"] == str(tmp_path / "a")
    assert (listed["step"], listed["steps"]) == (3, 3)
    for name in ("eval_loss", "eval_loss_before", "train_loss", "predicted_peak_memory"):
        assert listed[name] == result[name]
    shown = said(capsys, "runs", "show", str(tmp_path / "a"))
    assert shown["config"]["lora"]["r"] == 2
    assert len(shown["curves"]["loss"]) == 3
    assert main(["runs"]) == main(["runs", "show", "1"]) == 0
    text = capsys.readouterr().out
    assert "lora.r: 2   (default 16)" in text
    assert "report.html" in text


def test_failed_and_interrupted_runs(
    state: Path, tiny_llama: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for number, (error, code) in enumerate([(KeyboardInterrupt(), 130), (RuntimeError("it broke"), 1)]):

        def fail(*arguments: Any, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("halfbyte.train.loop.update", fail)
            assert main(command(tiny_llama, chat_file, tmp_path / str(number))) == code
    states = {run["output"][-1]: (run["state"], run["error"]) for run in said(capsys, "runs")["runs"]}
    assert states == {"0": ("interrupted", ""), "1": ("failed", "RuntimeError: it broke")}


def test_a_killed_run_is_a_crashed_one_with_its_steps(
    state: Path, tiny_llama: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it stays so when the next run takes the folder."""
    kill = (
        "import os, signal, sys\nfrom halfbyte.cli.main import main\nfrom halfbyte.train import metrics\n"
        "add = metrics.Metrics.add_step\n"
        "def add_step(self, step):\n    add(self, step)\n"
        "    if step.step == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "metrics.Metrics.add_step = add_step\nmain(sys.argv[1:])"
    )
    words = command(tiny_llama, chat_file, tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", kill, *words], capture_output=True, env=dict(os.environ))
    assert done.returncode == -9, done.stderr
    (crashed,) = said(capsys, "runs")["runs"]
    assert (crashed["state"], crashed["step"], crashed["steps"]) == ("crashed", 2, 3)
    assert main(words) == 0
    second, first = said(capsys, "runs")["runs"]
    assert second["state"] == "finished"
    assert (first["state"], first["step"]) == ("crashed", 2)
    assert [x for x, _ in said(capsys, "runs", "show", "1")["curves"]["loss"]] == [1, 2]


LONG = replace(
    RUN, title="a-model-with-a-very-long-name-instruct-q4_k_m.gguf", step=1200, steps=1200, seconds=40_000.0
)  # fmt: skip


def test_80_columns_are_enough(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = Runs(state)
    for name in ("a", "b"):
        runs.end(runs.begin(LONG, tmp_path / name), LONG, "interrupted")
    assert main(["runs"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2
    assert all(len(row) <= 80 for row in rows)
    assert all(part in rows[0] for part in ("2  interrupted", "1,200/1,200", "4.0000 → 3.5000", "a-mod"))
    assert [head.index(word) for word in ("state", "steps")] == [rows[0].index(w) for w in ("interrupted", "1,200")]
    assert main(["runs", "show", "2"]) == 0
    shown = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["model"].strip() == LONG.title
    assert shown["steps"].strip() == "1,200/1,200"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shwo"], "runs: there is no command 'shwo'. Did you mean 'show'. See halfbyte runs --help."),
        (["12"], "runs: there is no command '12'. Known are show, compare. See halfbyte runs --help."),
        (["show"], "runs show: RUN is not given. See halfbyte runs show --help."),
        (["--most", "0"], "--most: must be at least 1, not 0. See halfbyte runs --help."),
    ],
)
def test_a_wrong_command_names_the_way(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", *words]) == 2
    assert capsys.readouterr().err == f"halfbyte: {said}\n"


def test_compare(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(state)
    for name, run in (("a", RUN), ("b", OTHER)):
        runs.end(runs.begin(run, tmp_path / name), run, "finished")
    result = said(capsys, "runs", "compare", "1", str(tmp_path / "b"), "--page", str(tmp_path / "page.html"))
    assert result["differences"] == {"lora.r": [16, 8], "optim.lr": [2e-4, 1e-3]}
    page = (tmp_path / "page.html").read_text()
    capsys.readouterr()
    assert main(["runs", "compare", "1", "2"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "1", "2"]
    cells = {tuple(row.split()) for row in rows}
    assert {("lora.r", "16", "8"), ("optim.lr", "0.0002", "0.001"), ("state", "finished", "finished")} <= cells
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert "lora.r" in page
    assert main(["runs", "compare", "1"]) == 2
    assert main(["runs", "show", "7"]) == 2
    assert "7: no such run" in capsys.readouterr().err


def test_numbers_are_never_used_again(state: Path, tmp_path: Path) -> None:
    runs = Runs(state)
    assert [runs.begin(RUN, tmp_path / str(i)) for i in range(3)] == [1, 2, 3]
    assert [run.id for run in runs.all()] == [3, 2, 1]
    assert {run.state for run in runs.all()} == {"running"}


def spoilt(state: Path, how: str) -> None:
    state.parent.mkdir(parents=True)
    if how == "corrupt":
        state.write_bytes(b"SQLite format 3\0" + b"no" * 500)
    elif how == "folder":
        state.mkdir()
    else:
        with sqlite3.connect(state) as base:
            base.execute("pragma user_version = 99")
        base.close()


@pytest.mark.parametrize("how", ["corrupt", "folder", "newer"])
def test_a_list_that_cannot_be_written_stops_no_run(
    how: str, state: Path, tiny_llama: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt(state, how)
    assert main(command(tiny_llama, chat_file, tmp_path / "run")) == 0
    error = capsys.readouterr().err
    assert error.count("halfbyte runs will not list this run") == 1
    assert "will not know" not in error
    assert main(["runs"]) == 4
    assert f"{state}: cannot be read" in capsys.readouterr().err


def test_a_locked_list_is_waited_for_and_left(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.report.runs.PATIENCE", 0.1)
    runs = Runs(state)
    runs.begin(RUN, tmp_path)
    other = sqlite3.connect(state)
    other.execute("begin exclusive")
    with pytest.raises(StoreError, match=r"runs\.sqlite: database is locked"):
        runs.begin(RUN, tmp_path)
    other.close()
    assert runs.begin(RUN, tmp_path) == 2
