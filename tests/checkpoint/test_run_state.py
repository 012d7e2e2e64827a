"""Checkpoints come back to the bit, the newest good one is found, and only ours are ever deleted."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from halfbyte.checkpoint import (
    capture_rng,
    compare_config,
    environment_changes,
    latest_checkpoint,
    load_adapter,
    load_checkpoint,
    prune_checkpoints,
    restore_rng,
    save_checkpoint,
)
from halfbyte.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, to_dict
from halfbyte.errors import ConfigError, FileError, NumericsError

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
HASHES = {"base": "aa" * 32, "tokenizer": "bb" * 32, "data": "cc" * 32}
A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


@pytest.fixture(autouse=True)
def _keep_rng() -> Iterator[None]:
    before = capture_rng()
    yield
    restore_rng(before)


class Run:
    """A tiny run with dropout, whose data come from a generator of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.params = {A: nn.Parameter(torch.randn(2, 8)), B: nn.Parameter(torch.randn(6, 2))}
        self.optimizer = torch.optim.AdamW(list(self.params.values()), lr=1e-2)
        self.data = torch.Generator().manual_seed(1)
        self.steps = 0

    def step(self, count: int) -> None:
        for _ in range(count):
            x = torch.randn(4, 8, generator=self.data) + random.gauss(0, 1) + np.random.standard_normal()
            loss = (nn.functional.dropout(x @ self.params[A].T, 0.3) @ self.params[B].T).square().mean()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.steps += 1

    def save(self, output: Path, **changes: Any) -> Path:
        state: dict[str, Any] = {
            "adapter": self.params, "adapter_config": CONFIG, "info": {"base_sha256": HASHES["base"]},
            "optimizer": self.optimizer.state_dict(), "rng": capture_rng({"data": self.data}),
            "cursor": {"seed": 0, "epoch": 1, "index": 7}, "config": to_dict(RunConfig()), "hashes": HASHES,
        }  # fmt: skip
        return save_checkpoint(output, self.steps, **(state | changes))

    def load(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(checkpoint.adapter[name])
        self.optimizer.load_state_dict(checkpoint.optimizer)
        restore_rng(checkpoint.rng, {"data": self.data})
        self.steps = checkpoint.step

    def everything(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        moments = {f"{number}.{name}": value for number, part in state.items() for name, value in part.items()}
        return {**self.params, **moments, **capture_rng({"data": self.data})}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = Run()
    whole.step(3)  # an odd number of gauss() calls: Python keeps the second value for later
    path = whole.save(tmp_path)
    whole.step(4)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    resumed = Run()
    resumed.load(path)
    assert resumed.steps == 3
    resumed.step(4)
    assert same(whole.everything(), resumed.everything())


def test_everything_comes_back(tmp_path: Path) -> None:
    run = Run()
    run.step(1)
    checkpoint = load_checkpoint(run.save(tmp_path))
    assert checkpoint.step == 1
    assert checkpoint.cursor == {"seed": 0, "epoch": 1, "index": 7}
    assert checkpoint.config == to_dict(RunConfig())
    assert checkpoint.hashes == HASHES
    assert checkpoint.optimizer["param_groups"] == run.optimizer.state_dict()["param_groups"]
    assert environment_changes(checkpoint) == []
    checkpoint.environment["threads"] = 999
    assert environment_changes(checkpoint) == [f"threads 999 -> {torch.get_num_threads()}"]
    assert load_adapter(checkpoint.path).info["base_sha256"] == HASHES["base"]


def test_sixteen_bit_and_scalars_to_the_bit(tmp_path: Path) -> None:
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    state = {
        "state": {0: {"x": values, "n": 3, "f": 0.1 + 0.2}, 11: {"x": values.clone().view(2, -1)}},
        "param_groups": [],
    }
    loaded = load_checkpoint(Run().save(tmp_path, optimizer=state)).optimizer["state"]
    assert torch.equal(loaded[0]["x"].view(torch.int16), values.view(torch.int16)), "NaN payloads too"
    assert (loaded[0]["n"], loaded[0]["f"]) == (3, 0.1 + 0.2)
    assert list(loaded) == [0, 11]


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    run = Run()
    run.params[B].data[0, 0] = torch.inf
    with pytest.raises(NumericsError, match="lora_B"):
        run.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rng_of_something_else_is_refused() -> None:
    state = capture_rng()
    with pytest.raises(FileError, match="generator"):
        restore_rng(state, {"data": torch.Generator()})
    with pytest.raises(FileError, match="random number"):
        restore_rng(state | {"torch.cpu": torch.zeros(3)})


def saved(tmp_path: Path, count: int) -> list[Path]:
    run, paths = Run(), []
    for _ in range(count):
        run.step(1)
        paths.append(run.save(tmp_path))
    return paths


def damage(path: Path) -> None:
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_latest_falls_back_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    paths = saved(tmp_path, 11)  # 11 is newer than 9, whatever the alphabet says
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-98").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    damage(paths[10])
    with caplog.at_level(logging.WARNING, "halfbyte"):
        assert latest_checkpoint(tmp_path) == paths[9]
    assert "checkpoint-11 is passed over" in caplog.text
    assert "optimizer.safetensors" in caplog.text
    with pytest.raises(FileError, match=r"optimizer\.safetensors"):
        load_checkpoint(paths[10])


def test_files_of_two_steps_mixed(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 2)
    (second / "rng.safetensors").write_bytes((first / "rng.safetensors").read_bytes())
    (second / "run_state.json").write_bytes((first / "run_state.json").read_bytes())
    assert latest_checkpoint(tmp_path) == first


def test_saving_the_same_step_again(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    damage(path)
    assert saved(tmp_path, 1) == [path]
    assert latest_checkpoint(tmp_path) == path
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_folder_in_the_way_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged manifest proves nothing, and transformers names its checkpoints as we do; a run stops for neither."""
    (path,) = saved(tmp_path, 1)
    (path / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING, "halfbyte"):
        saved(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == path
    assert (tmp_path / "checkpoint-1.old-1" / "manifest.json").read_text() == "{"
    assert "checkpoint-1.old-1" in caplog.text


def test_prune_keeps_verified_ones_and_what_is_not_ours(tmp_path: Path) -> None:
    paths = saved(tmp_path, 6)
    damage(paths[5])
    (paths[0] / "notes.txt").write_text("mine")
    for name in ("checkpoint-2000", "checkpoint-0", "samples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert prune_checkpoints(tmp_path, 2) == [paths[2], paths[1]]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "checkpoint-6", "checkpoint-5", "checkpoint-4", "checkpoint-1", "checkpoint-2000", "checkpoint-0", "samples",
    }  # fmt: skip


def test_compare_config_allows_what_changes_no_step() -> None:
    before = RunConfig(model=ModelConfig(path="/a/model"), train=TrainConfig(steps=10, output="x"))
    after = replace(
        before, model=ModelConfig(path="model"), train=TrainConfig(steps=20, save_every=5, keep=3, output="y")
    )
    found = compare_config(to_dict(before), to_dict(after), saved_hashes=HASHES, current_hashes=HASHES)
    assert {each.key for each in found} == {
        "model.path", "train.output", "train.steps", "train.save_every", "train.keep",
    }  # fmt: skip
    assert str(next(each for each in found if each.key == "train.steps")) == "train.steps 10 -> 20"


def test_compare_config_lists_every_field() -> None:
    before = RunConfig(model=ModelConfig(path="/a/model"))
    after = RunConfig(
        model=ModelConfig(path="model"), lora=LoraConfig(r=8, target_modules=("q_proj",)),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99)), data=DataConfig(max_seq_len=512), train=TrainConfig(seed=1),
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        compare_config(
            to_dict(before), to_dict(after), saved_hashes=HASHES, current_hashes=HASHES | {"base": "dd" * 32}
        )
    for text in (
        "model.path '/a/model' -> 'model'", "lora.r 16 -> 8", "lora.target_modules 'all-linear' -> ['q_proj']",
        "optim.lr 0.0002 -> 0.001", "optim.betas [0.9, 0.999] -> [0.9, 0.99]", "data.max_seq_len 1024 -> 512",
        "train.seed 0 -> 1", "sha256 of base aaaaaaaaaaaa -> dddddddddddd",
    ):  # fmt: skip
        assert text in str(caught.value)


def test_compare_config_across_versions() -> None:
    current = to_dict(RunConfig())
    older = {section: dict(part) for section, part in current.items()}
    del older["data"]["on_long"], older["optim"]
    assert compare_config(older, current) == []
    older["lora"]["gone"] = 1
    with pytest.raises(ConfigError, match=r"lora\.gone 1 -> None"):
        compare_config(older, current)
