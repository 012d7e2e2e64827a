"""What is run, what is left out, what a row says; processes are stood in for, but in the last test."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.compare import job
from halfbyte.compare.cells import Base, Cell, Failure
from halfbyte.compare.variants import chosen
from halfbyte.config import RunConfig, load_config
from halfbyte.errors import ConfigError, HalfbyteError

LOSSES = {"16bit": 2.0, "nf4": 2.1, "fp4": 2.1}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Runs that take a second of a clock of their own, with a loss by variant and seed."""
    done: list[tuple[str, int]] = []
    clock = [0.0]

    def run_cell(run: RunConfig, variant: Any, base: Base, seed: int, folder: Path) -> Cell:
        done.append((variant.name, seed))
        clock[0] += 30.0
        if variant.name == "fp4" and seed == 1:
            return Cell(variant.name, seed, [], 30.0, failure=Failure("the gradient is not finite", 5))
        noise = {"nf4": 0.001 * seed}.get(variant.name, 0.0) + 0.3 * seed
        result = {
            "eval_loss_before": 3.0, "eval_loss": LOSSES[variant.name] + noise, "tokens_per_s": 100.0,
            "peak_memory": 10**9, "answers": [{"prompt": "<b>?", "expected": "x", "before": "", "after": "y"}],
        }  # fmt: skip
        return Cell(variant.name, seed, [], 30.0, result, [(1, 3.0), (2, 2.5)])

    monkeypatch.setattr(job, "run_cell", run_cell)
    monkeypatch.setattr(job, "kept_cell", lambda *_: None)
    monkeypatch.setattr(job, "check_run", lambda run: None)
    monkeypatch.setattr(job, "prepare_base", lambda run, variant, folder: Base("m", 10**8))
    monkeypatch.setattr(job.time, "perf_counter", lambda: clock[0])
    return done


def config(tmp_path: Path) -> RunConfig:
    return load_config(None, ["model.path=m", "data.train=t", "data.eval=e", f"train.output={tmp_path}"])


def test_rows_and_page(ran: list[tuple[str, int]], tmp_path: Path) -> None:
    said: list[str] = []
    result = job.compare(config(tmp_path), chosen("16bit,nf4", []), tmp_path, seeds=3, minutes=60, say=said.append)
    assert ran == [("16bit", 0), ("nf4", 0), ("16bit", 1), ("nf4", 1), ("16bit", 2), ("nf4", 2)]
    first, second = result.rows
    assert first.difference is None
    assert second.difference is not None
    assert second.difference.value == pytest.approx(0.101)
    assert second.difference.real
    assert second.seeds == (0, 1, 2)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "&lt;b&gt;?" in page
    assert "higher" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")  # names in the pictures, which nothing fetches
    assert json.loads((tmp_path / "compare.json").read_text())["rows"][1]["after"]["value"] == second.after.value
    assert len(said) == 6


def test_time_that_is_up_leaves_whole_seeds_out(ran: list[tuple[str, int]], tmp_path: Path) -> None:
    result = job.compare(config(tmp_path), chosen("16bit,nf4", []), tmp_path, seeds=5, minutes=2.2)
    assert ran == [("16bit", 0), ("nf4", 0), ("16bit", 1), ("nf4", 1)]
    assert "2 seeds (5 were asked for)" in (tmp_path / "report.html").read_text()
    assert result.wanted_seeds == 5


def test_a_variant_that_fails_is_named_and_left(ran: list[tuple[str, int]], tmp_path: Path) -> None:
    result = job.compare(config(tmp_path), chosen("nf4,fp4", []), tmp_path, seeds=3, minutes=60)
    assert ("fp4", 2) not in ran
    assert result.rows[1].seeds == (0,)
    assert result.rows[1].failed == "the gradient is not finite"


def test_what_has_to_be_there(ran: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.eval: is not set"):
        job.compare(replace(run, data=replace(run.data, eval="")), chosen("nf4,fp4", []), tmp_path, seeds=1, minutes=1)
    with pytest.raises(ConfigError, match=r"variant bad: .*rank"):
        job.compare(run, chosen("nf4", ["bad:lora.r=0"]), tmp_path, seeds=1, minutes=1)
    monkeypatch.setattr(job, "prepare_base", lambda *_: Base("m", failure=Failure("no such model", 3)))
    with pytest.raises(HalfbyteError, match="nf4: no such model; fp4: no such model") as failed:
        job.compare(run, chosen("nf4,fp4", []), tmp_path, seeds=1, minutes=1)
    assert failed.value.exit_code == 3
    assert not ran


def test_the_command_trains_and_keeps(make_llama: Any, chat_file: Path, tmp_path: Path) -> None:
    """Full fine-tuning beside an adapter, for real; a second call runs nothing again."""
    command = [
        sys.executable, "-m", "halfbyte", "compare", "--model", str(make_llama()), "--data", str(chat_file),
        "--eval-data", str(chat_file), "--output", str(tmp_path / "out"), "--variants", "nf4,full", "--seeds", "1",
        "--steps", "2", "--json",
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert first.returncode == 0, first.stderr
    rows = json.loads(first.stdout)["rows"]
    assert [row["failed"] for row in rows] == ["", ""]
    assert all(0 < row["after"]["value"] < 10 for row in rows)
    assert rows[0]["before"] != rows[1]["before"]  # four bits lose something
    assert rows[0]["base_bytes"] < rows[1]["base_bytes"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert again.stderr.count("kept from before") == 2
    assert json.loads(again.stdout)["rows"][0]["losses"] == rows[0]["losses"]


def test_a_signal_ends_the_run_in_progress_too(make_llama: Any, chat_file: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "halfbyte", "compare", "--model", str(make_llama()), "--data", str(chat_file),
        "--eval-data", str(chat_file), "--output", str(tmp_path / "out"), "--variants", "nf4,fp4", "--steps", "5000",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "out" / "runs" / "nf4-0" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.splitlines()[-1].startswith("halfbyte: interrupted: the same command keeps 0 finished runs")
    size = metrics.stat().st_size
    time.sleep(1.0)
    assert metrics.stat().st_size == size


def wait_for(condition: Callable[[], bool]) -> None:
    """Up to two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
