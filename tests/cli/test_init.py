"""halfbyte init: what it writes fits, loads, trains, and says why; what the user says stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import init as room
from halfbyte.cli.main import main
from halfbyte.config import QuantConfig, load_config
from halfbyte.plan import Samples, first_settings, read_base, sequence_length

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def told(out: str) -> Any:
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.filterwarnings("ignore")  # what the command line hides from users, it hides here
def test_the_file_plans_and_trains(
    tiny_llama: Path,
    chat_file: Path,
    eval_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(
        capsys, "init", "--model", tiny_llama, "--data", chat_file, "--eval-data", eval_file, "--json"
    )
    assert code == 0, err
    result = told(out)
    assert result["fits"]
    assert result["settings"].keys() == result["why"].keys()
    assert all(result["why"].values())
    assert result["settings"]["data.format"] == "messages"
    assert "memory.budget" in result["settings"] or "container" in Path("run.toml").read_text(encoding="utf-8")
    config = load_config("run.toml")
    assert (config.data.train, config.train.epochs, config.data.max_seq_len) == (str(chat_file), 3, 256)  # its context
    code, out, _ = run(capsys, "plan", "--config", "run.toml", "--json")
    assert told(out)["peak_memory"] == result["peak_memory"]
    code, out, err = run(
        capsys, "train", "--config", "run.toml", "--steps", 2, "--set", "optim.warmup_steps=0", "--json"
    )
    assert code == 0, err
    assert told(out)["steps"] == 2


def test_what_the_user_says_stays_and_files_too(tiny_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "a.toml"
    arguments = ("init", "--model", tiny_llama, "--output", file, "--memory", "2GB")
    code, _, err = run(capsys, *arguments, "--set", "lora.r=4", "--set", "data.max_seq_len=128")
    assert code == 0
    assert "lora.r = 4   as you said" in err
    config = load_config(file)
    assert (config.lora.r, config.data.max_seq_len, config.memory.budget) == (4, 128, "2GB")
    assert "no data was given" in file.read_text(encoding="utf-8")
    code, _, err = run(capsys, *arguments)
    assert (code, "is there already" in err) == (2, True)
    assert run(capsys, "init", "--output", tmp_path / "b.toml")[0] == 2, "no model, and nobody to ask"
    code, _, err = run(capsys, "init", "--model", tiny_llama, "--memory", "100MB", "--output", tmp_path / "b.toml")
    assert (code, "are needed at least" in err) == (4, True)
    assert not (tmp_path / "b.toml").exists()


def test_it_asks_on_a_terminal(
    tiny_llama: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    answers = iter([str(tiny_llama), str(chat_file)])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(answers))
    code, _, err = run(capsys, "init", "--output", tmp_path / "run.toml")
    assert code == 0, err
    assert load_config(tmp_path / "run.toml").data.train == str(chat_file)


def test_a_large_file_is_measured_by_its_beginning(
    tiny_llama: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large.jsonl"
    large.write_bytes(chat_file.read_bytes() * 20)
    monkeypatch.setattr(room, "MOST_READ", 2 * chat_file.stat().st_size)
    samples = room._measure(load_config(model__path=str(tiny_llama), data__train=str(large)))
    assert samples.scale == pytest.approx(10, rel=0.1)
    assert samples.path == str(large)


def test_reasons_follow_the_data(tiny_llama: Path) -> None:
    base = read_base(str(tiny_llama), load_config().quant, "float32")
    tails = Samples(path="", format="text", lengths=[100] * 999 + [5000])
    assert sequence_length(base, tails).value == base.architecture.context == 256
    assert "0.1% of the samples are longer" in sequence_length(base, tails).why
    few, steps = first_settings(base, 512, Samples(path="", format="text", lengths=[512] * 10), held_out=True)
    assert (few["train.epochs"].value, few["train.gradient_accumulation_steps"].value, steps) == (3, 1, 30)
    many, steps = first_settings(
        base, 512, Samples(path="", format="text", lengths=[512] * 9000, scale=2), held_out=False
    )
    assert (many["train.epochs"].value, many["train.gradient_accumulation_steps"].value, steps) == (1, 8, 2250)
    assert "train.eval_every" not in many


def test_little_memory_is_met_with_the_same_numbers_first_and_shorter_samples_last(
    tmp_path: Path, capsys: Capture
) -> None:
    """A Llama of 1.1B of which there is only the config, in the least memory that a sequence of 512 tokens needs."""
    config = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ask = ("--model", tmp_path, "--set", "data.max_seq_len=512", "--json")
    least = told(run(capsys, "plan", *ask)[1])["smallest_memory"]
    file = tmp_path / "run.toml"
    code, out, err = run(
        capsys, "init", "--model", tmp_path, "--memory", least + 10_000_000, "--output", file, "--json"
    )
    assert code == 0, err
    result = told(out)
    assert result["settings"]["train.gradient_checkpointing"]
    assert (result["settings"]["data.max_seq_len"], result["why"]["data.max_seq_len"]) == (
        512,
        "to fit; 1024 would not",
    )
    planned = told(run(capsys, "plan", "--config", file, "--json")[1])
    assert planned["fits"]
    assert not planned["changes"]


def test_a_reason_says_why_a_number_is_what_it_is(tiny_llama: Path) -> None:
    base = read_base(str(tiny_llama), QuantConfig(), "float32")
    base = replace(base, architecture=replace(base.architecture, context=4096))
    few = Samples(path="a.jsonl", format="prompt", lengths=[20] * 40)
    length = sequence_length(base, few)
    assert length.value == 512
    assert length.why.endswith("No less than 512: several samples share a sequence, and short ones fill badly")
    settings, steps = first_settings(base, 512, few, held_out=True)
    assert steps == 6
    assert settings["train.save_every"].value == settings["train.eval_every"].value == 1
    assert settings["train.save_every"].why.startswith("a checkpoint after each step, for the run has about 6;")
    many = Samples(path="a.jsonl", format="prompt", lengths=[1000] * 1000)
    assert "No less" not in sequence_length(base, many).why
    settings, steps = first_settings(base, 1024, many, held_out=True)
    every = settings["train.save_every"]
    assert every.value == steps // 10
    assert every.why.startswith(f"a checkpoint each {every.value} steps, some {steps // every.value} in the run;")
