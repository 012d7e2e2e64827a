"""A conversation in the terminal: what is said, what is kept, and what of it is computed again."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import write_random_adapter

from halfbyte.checkpoint import load_adapter
from halfbyte.cli.chat import name_adapters
from halfbyte.cli.main import main
from halfbyte.cli.served import Wanted, open_served
from halfbyte.cli.speaker import Answer, Conversation, Speaker, TooLongError
from halfbyte.config import QuantConfig, load_config
from halfbyte.data.records import RecordReader
from halfbyte.errors import ConfigError
from halfbyte.model import load_model
from halfbyte.model.adapt import attach_saved
from halfbyte.model.generate import generate_ids, prompt_ids
from halfbyte.serve import Adapters, Engine
from halfbyte.serve.sampling import Sampling
from halfbyte.serve.text import Texts

NEW = 6
"""Tokens of an answer: the tiny model's never end by themselves."""
Talk = Callable[..., tuple[list[dict[str, Any]], str]]


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters for `tiny_llama`."""
    loaded = load_model(tiny_llama, QuantConfig(), compute_dtype=torch.float32)
    made = tmp_path_factory.mktemp("adapters")
    return [write_random_adapter(made / name, loaded.model, loaded.base_sha256, at) for at, name in enumerate("xy")]


@pytest.fixture
def talk(
    tiny_llama: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """`talk(lines)`: the JSON lines of a chat with both adapters, and what it noted beside."""

    def run(lines: list[str], *options: str) -> tuple[list[dict[str, Any]], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        command = ["chat", "--model", str(tiny_llama), f"--adapter={folders[0]}", f"--adapter=why={folders[1]}"]
        command += ["--json", "--max-new-tokens", str(NEW), "--set", "quant.compute_dtype=float32", *options]
        assert main(command) == 0
        said = capsys.readouterr()
        return [json.loads(line) for line in said.out.splitlines()], said.err

    return run


def generated(model: Path, adapter: Path | None, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """What `halfbyte generate` answers."""
    loaded = load_model(model, QuantConfig(), compute_dtype=torch.float32).model
    adapted = attach_saved(loaded, load_adapter(adapter)) if adapter else loaded
    (ids,) = generate_ids(adapted, tokenizer, [prompt_ids(tokenizer, messages)], max_new_tokens=NEW)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_a_conversation(
    talk: Talk, tiny_llama: Path, folders: list[Path], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    said = [
        "What follows 3?", "", "/adapter why", "And then?", "/adapter off", "/compare What?", "/retry", "/adapters",
        "/adapter", "/adapter nobody", "/nothing", f"/save {file}", "/new", f"/save {file}", "/system Count.", "//x",
        "/compare", "/retry now", "/quit", "never read",
    ]  # fmt: skip
    (*answers, last), notes = talk(said)
    base = tiny_llama.name
    assert [answer["model"] for answer in answers] == ["x", "why", base, "x", "why", base, "why", "why"]
    assert all(answer["new_tokens"] == NEW for answer in answers)
    for note in (
        f"* {base} (the base)",
        "talking to why",
        "no adapter nobody",
        "/nothing is no command",
        "nothing has",
    ):
        assert note in notes

    asked = [{"role": "user", "content": "What follows 3?"}]
    assert answers[0]["text"] == generated(tiny_llama, folders[0], tiny_tokenizer, asked)
    asked += [{"role": "assistant", "content": answers[0]["text"]}, {"role": "user", "content": "And then?"}]
    assert answers[1]["text"] == generated(tiny_llama, folders[1], tiny_tokenizer, asked)
    # Asked again of the base; the comparison between has left nothing behind.
    assert answers[5]["text"] == generated(tiny_llama, None, tiny_tokenizer, asked)
    asked += [{"role": "assistant", "content": answers[5]["text"]}]
    kept = [list(record.messages) for record in RecordReader(file)]
    assert kept[1:] == [asked]
    assert last["messages"] == [
        {"role": "system", "content": "Count."}, {"role": "user", "content": "/x"},
        {"role": "assistant", "content": answers[7]["text"]},
    ]  # fmt: skip


def test_what_was_read_is_not_read_again(talk: Talk) -> None:
    answers, _ = talk(["What follows 3?"] + ["And then?"] * 5)
    for before, answer in pairwise(answers[:-1]):
        # All but the last tokens of the answer before and a part of a block.
        assert answer["reused_tokens"] >= before["prompt_tokens"] - 16
        assert answer["prompt_tokens"] - answer["reused_tokens"] < 64


def test_longer_than_the_context(talk: Talk) -> None:
    (*answers, last), notes = talk(["x " * 200, *["What follows 3?"] * 8], "--context", "128")
    assert "not asked: " in notes
    assert "tokens do not fit a context of 128" in notes
    assert notes.count("messages are left out") in (1, 2)  # half of the context at a time, not a turn at a time
    assert len(answers) == 8
    assert len(last["messages"]) == 16  # all are kept, for /save
    assert max(answer["prompt_tokens"] for answer in answers) <= 128 - NEW


def test_names_of_adapters(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    (tmp_path / "run").mkdir()
    found = name_adapters([f"x={tmp_path}/run", f"{tmp_path}/run/", f"{tmp_path}/a=b"])
    assert list(found) == ["x", "run", "a-b"]
    with pytest.raises(ConfigError, match="two adapters called x"):
        name_adapters(["x=a", "x=b"])


class Shown:
    """A screen that sends Ctrl-C after some text."""

    def __init__(self, stop_after: int) -> None:
        self.text, self.ended, self._stop_after = "", 0, stop_after

    def begin(self, answer: Answer) -> None: ...

    def write(self, text: str) -> None:
        before, self.text = self.text, self.text + text
        if len(before) < self._stop_after <= len(self.text):
            signal.raise_signal(signal.SIGINT)

    def end(self, answer: Answer) -> None:
        self.ended += 1


@pytest.fixture
def speaker(tiny_llama: Path) -> Iterator[tuple[Speaker, Adapters, Texts]]:
    run = load_config(None, ["quant.compute_dtype=float32"], model__path=str(tiny_llama))
    served = open_served(run, Wanted(name="base", named=[], context=256, positions=256, answers=2, http=False))
    engine = Engine(served.decoder)
    engine.start()
    yield Speaker(engine, served.texts), served.adapters, served.texts
    engine.stop(5)
    assert engine.pool.in_use == 0


def test_ctrl_c_stops_the_answer(speaker: tuple[Speaker, Adapters, Texts]) -> None:
    talker, adapters, texts = speaker
    before = signal.getsignal(signal.SIGINT)
    prompt = texts.plain("What follows 3?")
    for after, reason in ((3, "cancelled"), (10**6, "length")):
        shown = Shown(after)
        voices = adapters.all() * 2
        answers = talker.ask(voices, prompt, max_tokens=200, sampling=Sampling(), screen=shown)
        assert [answer.finish for answer in answers] == [reason, reason]
        assert shown.text == "".join(answer.text for answer in answers)
        assert shown.ended == 2
        assert signal.getsignal(signal.SIGINT) is before
    assert answers[0].new_tokens == 200
    assert answers[0].tokens_per_s > 0


def test_the_oldest_turns_are_left_out(speaker: tuple[Speaker, Adapters, Texts]) -> None:
    texts = speaker[2]
    talk = Conversation(texts, "Count.", 64)
    left_out = 0
    for number in range(40):
        ids, most, now = talk.prompt(f"What follows {number}?")
        left_out += now
        assert len(ids) + most <= texts.context
        seen = [*talk.messages[1 + left_out :], {"role": "user", "content": f"What follows {number}?"}]
        assert ids == texts.chat(talk.messages[:1] + seen)
        talk.add(f"What follows {number}?", f"After {number} comes {number + 1}.")
    assert left_out > 40
    with pytest.raises(TooLongError):
        talk.prompt("x " * 300)
    talk.clear()
    assert talk.prompt("x")[0] == texts.chat([talk.messages[0], {"role": "user", "content": "x"}])


def test_without_the_extra(tiny_llama: Path) -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(('starlette', 'uvicorn', 'halfbyte.serve.schema')));"
    code += f"from halfbyte.cli.main import main; sys.exit(main(['chat', '--model', {str(tiny_llama)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], input="Hello\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
