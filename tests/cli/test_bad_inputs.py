"""What people bring and what they are told: base models, data, settings, adapters with something wrong, at the command
line. One line each, the exit code of docs/config.md, and nothing left behind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")  # what the command line hides from users, it hides here
Change = Callable[[Path], object]
WEIGHTS = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good_adapter(tiny_llama: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("good") / "run"
    command = ["train", "--model", str(tiny_llama), "--data", str(chat_file), "--output", str(output), "--steps", "1"]
    assert main([*command, "--set", "lora.r=2", "--set", "data.max_seq_len=96"]) == 0
    return output / "adapter"


@pytest.fixture
def place(tiny_llama: Path, chat_file: Path, good_adapter: Path, tmp_path: Path) -> Path:
    """model/, data.jsonl and adapter/, all good, to be spoilt."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    shutil.copytree(good_adapter, tmp_path / "adapter")
    shutil.copyfile(chat_file, tmp_path / "data.jsonl")
    return tmp_path


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, the last line on standard error), the only one that is an error."""
    capsys.readouterr()
    code = main(arguments)
    lines = capsys.readouterr().err.rstrip().splitlines()
    assert sum(line.startswith("halfbyte: ") for line in lines) == 1, lines
    assert lines[-1].startswith("halfbyte: "), lines
    assert "Traceback" not in "".join(lines)
    assert "internal error" not in lines[-1]
    return code, lines[-1]


def tensors(**changed: torch.Tensor | None) -> Change:
    """The weights with some changed; None: removed."""

    def change(place: Path) -> None:
        names = {
            "q": Q,
            "embed": "model.embed_tokens.weight",
            "norm": "model.norm.weight",
            "more": "model.more.weight",
        }
        state = load_file(place / "model" / WEIGHTS)
        for name, value in changed.items():
            state.pop(names[name], None)
            if value is not None:
                state[names[name]] = value
        save_file(state, place / "model" / WEIGHTS, metadata={"format": "pt"})

    return change


def config(**changed: Any) -> Change:
    """config.json with some values changed."""

    def change(place: Path) -> None:
        path = place / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def data(*lines: str | bytes) -> Change:
    """A data file of these lines."""
    raw = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
    return lambda place: (place / "data.jsonl").write_bytes(raw)


def adapter_config(**changed: Any) -> Change:
    """adapter_config.json changed by a person: the manifest goes, as a message elsewhere advises."""

    def change(place: Path) -> None:
        path = place / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        (place / "adapter" / "manifest.json").unlink()

    return change


def adapter_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """The adapter's tensors changed."""

    def spoil(place: Path) -> None:
        path = place / "adapter" / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)
        (place / "adapter" / "manifest.json").unlink()

    return spoil


def pickled(place: Path) -> None:
    (place / "model" / WEIGHTS).unlink()
    (place / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def pickled_adapter(place: Path) -> None:
    (place / "adapter" / "adapter_model.safetensors").rename(place / "adapter" / "adapter_model.bin")


def cut(place: Path) -> None:
    path = place / "model" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def chat(*turns: tuple[str, Any]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


GOOD = chat(("user", "a"), ("assistant", "b"))
MODELS: dict[str, tuple[Change, str]] = {
    "cut short": (cut, "model.safetensors"),
    "empty file": (lambda p: (p / "model" / WEIGHTS).write_bytes(b""), "model.safetensors"),
    "length of 2^60": (
        lambda p: (p / "model" / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        "model.safetensors",
    ),
    "pickle": (pickled, "pickle"),
    "no weights": (lambda p: (p / "model" / WEIGHTS).unlink(), "no .safetensors file"),
    "no config": (lambda p: (p / "model/config.json").unlink(), "config.json"),
    "config is no JSON": (lambda p: (p / "model/config.json").write_text("{"), "config"),
    "unknown architecture": (config(model_type="nope", architectures=["Nope"]), "nope"),
    "hidden size": (config(hidden_size=128), "model"),
    "vocabulary": (config(vocab_size=999), "embed_tokens"),
    "a tensor less": (tensors(norm=None), "model.norm.weight"),
    "a tensor more": (tensors(more=torch.ones(3)), "model.more.weight"),
    "integers": (tensors(q=torch.ones(64, 64, dtype=torch.int32)), Q),
    "NaN": (tensors(q=torch.full((64, 64), torch.nan)), Q),
    "infinite": (tensors(q=torch.full((64, 64), torch.inf, dtype=torch.bfloat16)), Q),
    "another quantization": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    "no tokenizer": (lambda p: [f.unlink() for f in (p / "model").glob("*token*")], "tokenizer"),
}
DATA: dict[str, tuple[Change, str]] = {
    "empty": (data(b""), "data.jsonl"),
    "blank lines": (data("", " ", ""), "data.jsonl"),
    "line 2 is no JSON": (data(GOOD, '{"messages": ['), "data.jsonl:2"),
    "no UTF-8": (data(GOOD, b'{"text": "\xff"}'), "data.jsonl:2"),
    "a list": (data("[1, 2]"), "data.jsonl:1"),
    "unknown fields": (data('{"question": "a"}'), "question"),
    "content is a number": (data(chat(("user", 3), ("assistant", "b"))), "messages[0].content"),
    "unknown role": (data(chat(("wizard", "a"), ("assistant", "b"))), "wizard"),
    "two system turns": (data(chat(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d"))), "system"),
    "assistant first": (data(chat(("assistant", "b"))), "the user does not speak first"),
    "nothing to learn": (data(chat(("user", "a"))), "data.jsonl:1"),
    "nested deep": (data('{"messages": ' + "[" * 5000 + "]" * 5000 + "}"), "data.jsonl:1"),
    "two formats": (data(GOOD, '{"text": "x"}'), "data.jsonl:2"),
    "all too long": (data(chat(("user", "a" * 5000), ("assistant", "b"))), "longer than"),
    "not there": (lambda p: (p / "data.jsonl").unlink(), "data.jsonl"),
    "a folder": (lambda p: [(p / "data.jsonl").unlink(), (p / "data.jsonl").mkdir()], "data.jsonl"),
}
SETTINGS: dict[str, tuple[list[str], str]] = {
    "rate of 0": (["optim.lr=0"], "optim.lr"),
    "negative rate": (["optim.lr=-1"], "optim.lr"),
    "rate is NaN": (["optim.lr=nan"], "optim.lr"),
    "rank 0": (["lora.r=0"], "lora.r"),
    "alpha 0": (["lora.lora_alpha=0"], "lora.lora_alpha"),
    "dropout 1": (["lora.dropout=1"], "lora.dropout"),
    "batch 0": (["train.micro_batch_size=0"], "train.micro_batch_size"),
    "no such layer": (["lora.target_modules=nope"], "target_modules"),
    "misspelt": (["optim.lrr=1"], "optim.lr"),
    "betas": (["optim.betas=[0.9, 1.0]"], "optim.betas"),
    "block size": (["quant.blocksize=48"], "quant.blocksize"),
    "format": (["quant.quant_type=nf5"], "nf4"),
    "budget in words": (["memory.budget=plenty"], "memory.budget"),
}
ADAPTERS: dict[str, tuple[Change, str]] = {
    "pickle": (pickled_adapter, "pickle"),
    "flipped": (
        lambda p: (p / "adapter/adapter_config.json").write_bytes(
            (p / "adapter/adapter_config.json").read_bytes().replace(b'"r": 2', b'"r": 3')
        ), "adapter_config.json",
    ),
    "rank in config": (adapter_config(r=3), "rank"),
    "rank 0": (adapter_config(r=0), "r"),
    "DoRA": (adapter_config(use_dora=True), "DoRA"),
    "other kind": (adapter_config(peft_type="IA3"), "IA3"),
    "A without B": (adapter_tensors(lambda s: s.pop(next(k for k in s if "lora_B" in k))), "lora_"),
    "NaN": (adapter_tensors(lambda s: s.update({k: v * torch.nan for k, v in s.items()})), "not finite"),
    "other names": (
        adapter_tensors(lambda s: [s.update({k.replace("q_proj", "zz_proj"): s.pop(k)}) for k in list(s)]), "zz_proj"
    ),
    "another base": (tensors(norm=torch.full((64,), 0.5, dtype=torch.bfloat16)), "base"),
    "not there": (lambda p: shutil.rmtree(p / "adapter"), "adapter"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "name"), [("train", name) for name in MODELS] + [("quantize", name) for name in MODELS][:-1]
)  # quantizing needs no tokenizer
def test_models(command: str, name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, word = MODELS[name]
    change(place)
    more = ["--data", str(place / "data.jsonl"), "--steps", "1"] if command == "train" else []
    code, line = said([command, "--model", str(place / "model"), "--output", str(place / "out"), *more], capsys)
    assert (code, word in line) == (3, True), line
    assert not (place / "out").exists()


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, word = DATA[name]
    change(place)
    arguments = ["--model", str(place / "model"), "--data", str(place / "data.jsonl"), "--set", "data.max_seq_len=96"]
    code, line = said(["train", *arguments, "--output", str(place / "out"), "--steps", "1"], capsys)
    assert (code, word in line) == (3, True), line
    assert not (place / "out").exists()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, word = SETTINGS[name]
    arguments = ["--model", str(place / "model"), "--data", str(place / "data.jsonl"), "--output", str(place / "out")]
    code, line = said(["train", *arguments, *(part for text in settings for part in ("--set", text))], capsys)
    assert (code, word in line) == (2, True), line
    assert not (place / "out").exists()


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("command", ["eval", "merge"])
def test_adapters(name: str, command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, word = ADAPTERS[name]
    change(place)
    arguments = [command, "--model", str(place / "model"), "--adapter", str(place / "adapter")]
    arguments += ["--data", str(place / "data.jsonl")]
    more = ["--output", str(place / "out"), "--format", "16bit"] if command == "merge" else []
    code, line = said([*arguments, *more], capsys)
    assert (code, word in line) == (3, True), line
    assert not (place / "out").exists()


def test_the_good_files_are_good(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(place / "model"), "--adapter", str(place / "adapter")]
    assert main(["eval", *arguments, "--data", str(place / "data.jsonl")]) == 0
    assert main(["merge", *arguments, "--format", "16bit", "--output", str(place / "out"),
                 "--data", str(place / "data.jsonl")]) == 0  # fmt: skip
    capsys.readouterr()
