"""Short runs on the tiny Llama."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import RunConfig, load_config

MakeRun = Callable[..., RunConfig]

BASICS = {
    "quant__compute_dtype": "float32", "lora__r": 4, "lora__lora_alpha": 8.0, "optim__lr": 5e-3, "train__steps": 6,
    "data__max_seq_len": 160,
}  # fmt: skip


TOOL, CALL = "<|tool|>", "<|call|>"


@pytest.fixture(scope="session")
def tool_file(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Path:
    """Answers that begin and end with texts that are no tokens yet."""
    path = tmp_path_factory.mktemp("data") / "tools.jsonl"
    rows = [json.loads(line) for line in chat_file.read_text().splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = f"{TOOL}{row['messages'][-1]['content']}{CALL}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_run(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> MakeRun:
    """`make_run("name", train__steps=3, ...)`: a run's config with its own output folder."""

    def make(name: str = "run", **settings: Any) -> RunConfig:
        paths = {
            "model__path": str(tiny_llama), "data__train": str(chat_file), "train__output": str(tmp_path / name),
        }  # fmt: skip
        return load_config(**BASICS | paths | settings)

    return make
