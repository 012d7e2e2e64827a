"""A model, data and an adapter, all good, to be spoilt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from halfbyte.cli.main import main


@pytest.fixture(scope="session")
def good_run(tiny_llama: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with its checkpoints."""
    output = tmp_path_factory.mktemp("good") / "run"
    command = ["train", "--model", str(tiny_llama), "--data", str(chat_file), "--output", str(output), "--steps", "2"]
    assert (
        main([*command, *(f"--set={text}" for text in ("lora.r=2", "data.max_seq_len=96", "train.save_every=1"))]) == 0
    )
    return output


@pytest.fixture
def place(tiny_llama: Path, chat_file: Path, good_run: Path, tmp_path: Path) -> Path:
    """model/, data.jsonl and adapter/, all good, to be spoilt."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    shutil.copytree(good_run / "adapter", tmp_path / "adapter")
    shutil.copyfile(chat_file, tmp_path / "data.jsonl")
    return tmp_path
