"""The error contract of the command line: one line, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.cli.main import main
from halfbyte.config import DataConfig, ModelConfig, RunConfig, TrainConfig


@pytest.fixture
def options(tiny_llama: Path, chat_file: Path, tmp_path: Path) -> list[str]:
    """Good options for `train`."""
    return ["--model", str(tiny_llama), "--data", str(chat_file), "--output", str(tmp_path / "run"), "--steps", "1"]


def fail(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, the one line on standard error) of a command that fails."""
    code = main(arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("halfbyte: ")]
    assert len(lines) == 1, captured.err
    assert captured.err.rstrip().endswith(lines[0])
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return code, lines[0]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["trian"], 2, "Did you mean 'train'"),
        (["train", "--nope"], 2, "train: there is no option --nope. "),
        (
            ["train", "--stepz", "3"],
            2,
            "train: there is no option --stepz. Did you mean '--steps'. See halfbyte train",
        ),
        (["train", "--steps", "x"], 2, "--steps: must be a whole number, not x. See halfbyte train --help."),
        (["train", "--steps"], 2, "--steps: needs a value. See"),
        (["plan", "--ranks", "0"], 2, "--ranks: must be at least 1, not 0. See halfbyte plan --help."),
        (["serve", "--port", "70000"], 2, "--port: must be at most 65535, not 70000."),
        (["quantize", "x"], 2, "quantize: takes no x. See halfbyte quantize --help."),
        (["data"], 2, "data: a command is missing. Known are preview, check. See halfbyte data --help."),
        (["train", "--set", "data.packing=yes"], 2, "data.packing cannot be 'yes': it takes true or false"),
        (["train", "--set", "optim.warmup_steps=x"], 2, "it takes a number"),
        (["train", "--set", "lora.target_modules=3"], 2, "it takes 'all-linear' or a list of texts"),
        (["train"], 2, "model.path: is not set. Give --model"),
        (["train", "--set", "lora.rank=3"], 2, "unknown key lora.rank"),
        (["train", "--set", "lorra.r=3"], 2, "Did you mean 'lora'"),
        (["train", "--set", "optim.lr=0"], 2, "optim.lr: 0.0 is not possible"),
        (["eval", "--set", "quant.embeddings=4"], 2, "quant.embeddings"),
        (["train", "--set", "lora.r=0"], 2, "the rank is at least 1"),
        (["train", "--steps", "-1"], 2, "--steps: -1 is not possible"),
        (["plan", "--memory", "9XB"], 2, "--memory: '9XB' is not a size"),
        (["plan", "--memory", "8GB", "--set", "memory.budget=9XB"], 2, "memory.budget: '9XB'"),
        (["quantize", "--quant-type", "nf5"], 2, "--quant-type: quant.quant_type cannot be 'nf5'"),
        (["train", "--config", "/nope.toml"], 2, "no such file"),
        (["quantize", "--model", "/nope"], 2, "--output: is not set"),
        (["eval", "--model", "/nope", "--data", "x.jsonl"], 3, "/nope: no such model"),
        (["generate", "--model", "/nope", "--prompt", " "], 2, "--prompt: is empty"),
        (["data", "check", "--model", "/nope", "--data", "x.jsonl"], 3, "/nope: no such model"),
    ],
)
def test_one_line_and_the_exit_code(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result, line = fail(arguments, capsys)
    assert result == code
    assert said in line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (["--set", "lora.target_modules=qq_proj"], 2, "This model has down_proj, gate_proj"),
        (["--set", "quant.skip_modules=nothing"], 2, "names no linear layer"),
        (["--resume", "/nope"], 3, "/nope"),
        (["--data", "/nope.jsonl"], 3, "/nope.jsonl"),
        (["--output", "/proc/nope"], 4, "/proc/nope"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing(
    options: list[str], settings: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = main(["train", *options, *settings])
    err = capsys.readouterr().err.splitlines()
    assert result == code
    assert said in err[-1]
    assert err[-1].startswith("halfbyte: ")
    assert not (tmp_path / "run" / "adapter").exists()


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "import-config" in captured.out
    assert captured.err == ""


def test_what_nobody_foresaw_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ZeroDivisionError("x" * 10_000)

    monkeypatch.setattr("halfbyte.config.load_config", explode)
    code, line = fail(["train", *options], capsys)
    assert code == 1
    assert "internal error: ZeroDivisionError" in line
    assert len(line) < 500
    with pytest.raises(ZeroDivisionError):
        main(["train", *options, "--debug"])


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 4), (BrokenPipeError(), 141)])
def test_interrupts_and_full_memory(
    monkeypatch: pytest.MonkeyPatch, options: list[str], error: BaseException, code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("halfbyte.config.load_config", stop)
    assert main(["train", *options]) == code
    assert ("halfbyte: " in capsys.readouterr().err) == (code != 141)  # nobody is left to read it


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("resume", "checkpoints", "said"),
    [
        (
            "auto",
            (),
            "no step was finished and no checkpoint saved, so nothing is kept and the same command begins anew",
        ),
        ("auto", (2, 10), "the same command goes on from {output}/checkpoint-10"),
        ("never", (10, 2), "--resume {output}/checkpoint-10 goes on from {output}/checkpoint-10"),
    ],
)
def test_ctrl_c_says_what_is_kept(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    resume: str, checkpoints: tuple[int, ...], said: str,
) -> None:  # fmt: skip
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    import halfbyte.train

    monkeypatch.setattr(halfbyte.train, "train", stop)
    output = tmp_path / "run"
    for step in checkpoints:
        (output / f"checkpoint-{step}").mkdir(parents=True)
        (output / f"checkpoint-{step}/manifest.json").touch()
    (output / "checkpoint-99").mkdir(parents=True)  # not whole
    assert main(["train", *options, "--resume", resume]) == 130
    assert "halfbyte: interrupted: " + said.format(output=output) in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_says_what_it_did_and_what_its_loss_is(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps now and in all; and which mean the loss is, beside the smoothed one of the progress."""
    options = options[:-1]
    assert main(["train", *options, "2", "--set", "train.save_every=2"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("2 steps in ")
    assert ", the mean of the last step (while it goes on, smoothed: 0.9 of" in first
    assert main(["train", *options, "20"]) == 0
    again = capsys.readouterr().out
    assert again.startswith("18 steps (20 in all) in ")
    assert ", the mean of the last 2 steps (" in again


def test_json_is_the_last_line_with_the_fields_of_the_design(options: list[str], eval_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "train", *options, "--eval-data", str(eval_file), "--json"],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(done.stdout.splitlines()) == 1
    assert {
        "steps", "train_loss", "eval_loss_before", "eval_loss", "tokens_per_s", "supervised_tokens_per_s", "seconds",
        "peak_memory", "predicted_peak_memory", "adapter",
    } <= set(result)  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_a_config_is_checked_before_anything_is_loaded() -> None:
    """Settings that contradict each other are found when the config is made."""
    with pytest.raises(ValueError, match="the output is a file"):
        RunConfig(
            model=ModelConfig(path="x"), data=DataConfig(train="x"), train=TrainConfig(output=__file__)
        )  # fmt: skip


def test_a_port_is_of_the_dashboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--model", "MODEL", "--data", "data.jsonl", "--output", str(tmp_path / "run")]
    assert main([*arguments, "--port", "8080"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "halfbyte: --port: is a port of --dashboard, which was not given. Give --dashboard, too."
    )
