"""The README's commands and snippets, run as a stranger would run them, on a tiny model."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from halfbyte.cli.main import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every `halfbyte ...` line."""
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith("halfbyte ")]


@pytest.fixture
def workplace(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, eval_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with MODEL, train.jsonl and held_out.jsonl in it, as the current one."""
    shutil.copytree(tiny_llama, tmp_path / "MODEL")
    shutil.copyfile(chat_file, tmp_path / "train.jsonl")
    shutil.copyfile(eval_file, tmp_path / "held_out.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask_once(run: Callable[..., None]) -> Callable[..., None]:
    """A server's `run` that ends after one answer."""

    def brief(server: Any, sockets: list[socket.socket]) -> None:
        thread = threading.Thread(target=run, args=(server, sockets))
        thread.start()
        body = {"model": "mine", "messages": [{"role": "user", "content": "What follows 3?"}], "max_tokens": 4}
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/v1/chat/completions"
        answer = httpx.post(url, json=body, timeout=60)
        server.should_exit = True
        thread.join()
        assert answer.json()["choices"][0]["message"]["role"] == "assistant", answer.text

    return brief


@pytest.mark.filterwarnings("ignore")  # what the command line hides from users, it hides here
def test_every_command_runs_in_order(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = commands()
    assert {shlex.split(line)[1] for line in lines} >= {
        "data", "train", "eval", "generate", "chat", "serve", "merge", "quantize", "compare", "doctor"
    }  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("What follows 3?\n/adapter off\n/new\n/quit\n"))
    monkeypatch.setattr("uvicorn.Server.run", ask_once(uvicorn.Server.run))
    for line in lines:
        more = {
            "serve": ["--port", "0"], "compare": ["--variants", "nf4,fp4", "--seeds", "1", "--steps", "2"]
        }.get(line.split()[1], [])  # fmt: skip
        assert main([*shlex.split(line, comments=True)[1:], *more, "--json"]) == 0, (line, capsys.readouterr().err)
        json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    for name in ("run/adapter/adapter_config.json", "run/metrics.jsonl", "run/curves.png", "run/report.html"):
        assert (workplace / name).stat().st_size > 0
    assert (workplace / "base-4bit" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_snippets_run(workplace: Path) -> None:
    recipe, whole_job = blocks("python")
    ids = torch.randint(0, 300, (2, 16))
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    exec(compile(recipe, "README.md", "exec"), {"dataset": dataset})
    names: dict[str, object] = {"tensor": torch.randn(8, 64)}
    exec(compile(whole_job, "README.md", "exec"), names)
    assert Path(names["result"].adapter).is_dir()  # type: ignore[attr-defined]


def test_the_quick_start_is_the_same_on_both_pages() -> None:
    index = (Path(__file__).parent.parent / "docs" / "index.md").read_text(encoding="utf-8")
    (quick,) = [block for block in blocks("bash") if "halfbyte init --model .venv" in block]
    assert f"```bash\n{quick}```" in index


def test_the_rooms_are_those_on_disk() -> None:
    """The tree in the README names every room, and no other."""
    root = Path(__file__).parent.parent
    tree = README.split("src/halfbyte/\n")[1].split("\ntests/")[0]
    named = set(re.findall(r"^  ([a-z]+)/", tree, re.MULTILINE))
    assert named == {p.name for p in (root / "src/halfbyte").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
