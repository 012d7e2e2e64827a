"""Samples given as objects: the run is that of the file they become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import halfbyte as hb
from halfbyte.errors import ConfigError, DataError

# peft 0.21 asks transformers 5.23 by a name that will go in its version 6
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def test_a_dataset_trains_as_its_file_does(tiny_llama: Path, chat_file: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    rows = [json.loads(line) for line in chat_file.read_text(encoding="utf-8").splitlines()]

    def run(name: str, file: str = "", **samples: Any) -> hb.TrainResult:
        config = hb.load_config(
            model__path=str(tiny_llama), data__train=file, train__output=str(tmp_path / name), train__steps=2
        )
        return hb.train(config, **samples)

    expected = run("file", str(chat_file))
    for name, samples in {"list": rows, "dataset": datasets.Dataset.from_list(rows)}.items():
        result = run(name, data=samples, eval_data=rows[:2])
        assert result.train_loss == expected.train_loss
        assert result.eval_loss is not None
        assert (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "file" / "adapter" / "adapter_model.safetensors"
        ).read_bytes()


def test_what_it_refuses(tiny_llama: Path, chat_file: Path, tmp_path: Path) -> None:
    config = hb.load_config(model__path=str(tiny_llama), train__output=str(tmp_path / "run"), train__steps=1)
    with pytest.raises(ConfigError, match="samples and a file of them"):
        hb.train(replace(config, data=replace(config.data, train=str(chat_file))), data=[{"text": "a"}])
    with pytest.raises(DataError, match=r"data\.train:2.*type str"):
        hb.train(config, data=[{"text": "a"}, "b"])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"data\.train:1.*bytes"):
        hb.train(config, data=[{"text": b"a"}])
    assert not (tmp_path / "run" / "train.jsonl").exists()
