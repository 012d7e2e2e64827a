"""Several ranks come to what one process comes to, with as much in a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from halfbyte.config import QuantConfig, RunConfig, to_dict
from halfbyte.model.quantize import quantize_model
from halfbyte.train import train

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
DRIVER = Path(__file__).with_name("ranked.py")
KILLS = Path(__file__).parents[1] / "faults" / "rank_kills.py"
LOSS, ADAPTER = 1e-6, 1e-5
"""Measured: 5e-7 at losses of 6, 2e-6 at entries up to 0.15."""

VARIANTS: dict[str, dict[str, Any]] = {
    "uneven": {"data__packing": False, "train__micro_batch_size": 20},  # of 48 samples the last 8 make a batch
    "accumulation": {
        "data__packing": False, "train__micro_batch_size": 8, "train__gradient_accumulation_steps": 2,
        "optim__schedule": "cosine",
    },
    "packed": {"train__micro_batch_size": 4},  # one pass is nine packs: of the ninth, three of four ranks have nothing
    "one base for all": {"train__micro_batch_size": 4},
    "sharded": {"train__micro_batch_size": 4},
    "sharded, uneven": {"data__packing": False, "train__micro_batch_size": 20, "train__gradient_checkpointing": True},
    "sharded, accumulation": {
        "data__packing": False, "train__micro_batch_size": 8, "train__gradient_accumulation_steps": 2,
        "optim__weight_decay": 0.1,
    },
    "new tokens": {"train__micro_batch_size": 4, "lora__trainable_tokens": ["After", "<|im_end|>"]},
    "sharded, whole tables": {"train__micro_batch_size": 4, "lora__modules_to_save": ["embed_tokens", "lm_head"]},
}  # fmt: skip


def under_torchrun(world: int, arguments: list[str | Path], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *options,
         *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def settings_of(config: RunConfig) -> dict[str, Any]:
    return {f"{section}__{key}": value for section, part in to_dict(config).items() for key, value in part.items()}


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


def distance(one: Path, other: Path) -> float:
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize(
    ("world", "names"),
    [
        (2, ["uneven", "one base for all", "sharded, accumulation"]), (4, ["packed", "sharded, uneven"]),
        pytest.param(2, [*VARIANTS], marks=pytest.mark.slow), pytest.param(4, [*VARIANTS], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_as_one_process(
    world: int, names: list[str], make_run: Callable[..., RunConfig], tiny_llama: Path, eval_file: Path,
    tmp_path: Path, record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    """w ranks x batch n/w == 1 x n: unpacked, packed and accumulated, whatever is left over at an epoch's end. One
    process goes on from the ranks' checkpoint."""
    stored = tmp_path / "stored"
    quantize_model(str(tiny_llama), stored, QuantConfig())
    alone: dict[str, RunConfig] = {}
    together: dict[str, RunConfig] = {}
    for name in names:
        common = VARIANTS[name] | {"data__eval": str(eval_file), "train__steps": 4, "train__save_every": 4}
        if "sharded" in name or "base" in name:
            common["model__path"] = str(stored)
        alone[name] = make_run(f"{name}-alone", **common)
        part = {"train__micro_batch_size": common["train__micro_batch_size"] // world}
        part |= {"train__sharding": "full"} if "sharded" in name else {}
        together[name] = make_run(f"{name}-{world}", **common | part)
    train_together(world, tmp_path, [*together.values()])
    for name in names:
        train(alone[name])
        check_alike(name, together[name], alone[name], record_property)
        longer = replace(alone[name], train=replace(alone[name].train, steps=8))
        train(longer)
        output = together[name].train.output
        train(replace(longer, train=replace(longer.train, output=output)))
        check_alike(f"{name}, gone on alone", together[name], alone[name], record_property)


def train_together(world: int, folder: Path, configs: list[RunConfig]) -> None:
    file = folder / "runs.jsonl"
    file.write_text("\n".join(json.dumps(settings_of(config)) for config in configs))
    done = under_torchrun(world, [DRIVER, file])
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_rank_that_fails_tells_the_others() -> None:
    """Once on a machine: the others end with the same reason, and keep silent."""
    done = under_torchrun(2, [DRIVER.with_name("failing_rank.py")])
    assert done.returncode == 0, done.stderr[-3000:]
    why = "run: cannot be written: No space left on device"
    assert sorted(done.stdout.splitlines()) == [
        f"rank 0 of 2|4|True|rank 0 of 2 ends: rank 1 of 2 failed: {why}", f"rank 1 of 2|4|False|{why}",
    ]  # fmt: skip


def test_sharded_equals_whole(make_run: Callable[..., RunConfig], tiny_llama: Path, tmp_path: Path) -> None:
    """To the bit: gathered bytes are those of the files, and moments are the same whoever keeps them. Either goes on
    from the other's checkpoint."""
    quantize_model(str(tiny_llama), tmp_path / "stored", QuantConfig())
    common = {
        "model__path": str(tmp_path / "stored"), "data__packing": False, "train__micro_batch_size": 2,
        "train__gradient_accumulation_steps": 2, "optim__bits": 8, "lora__r": 64, "train__save_every": 3,
    }  # fmt: skip
    whole = make_run("whole", **common)
    sharded = make_run("sharded", **common, train__sharding="full")
    first, second = (
        make_run("mixed", **common | {"train__steps": steps, "train__sharding": sharding})
        for steps, sharding in ((3, "none"), (6, "full"))
    )
    train_together(2, tmp_path, [whole, sharded, first, second])
    files = "adapter/adapter_model.safetensors", "checkpoint-6/optimizer.safetensors"
    for name in files:
        expected = (tmp_path / "whole" / name).read_bytes()
        assert [run for run in ("sharded", "mixed") if (tmp_path / run / name).read_bytes() != expected] == [], name


def check_alike(name: str, one: RunConfig, other: RunConfig, record: Callable[[str, object], None]) -> None:
    ours, theirs = Path(one.train.output), Path(other.train.output)
    apart = max(abs(a - b) for a, b in zip(losses(ours), losses(theirs), strict=True))
    far = distance(ours, theirs)
    record(f"{name}: losses", apart)
    record(f"{name}: adapter", far)
    assert apart < LOSS, name
    assert far < ADAPTER, name


@pytest.mark.parametrize(("kills", "seed", "steps"), [(1, 3, 60), pytest.param(20, 0, 600, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_killed_ranks_come_back_to_the_same_end(
    kills: int, seed: int, steps: int, tiny_llama: Path, chat_file: Path, tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    """torchrun starts them anew: losses, adapter, moments and random numbers equal the undisturbed run's bytes."""
    settings = {
        "model__path": str(tiny_llama), "data__train": str(chat_file), "train__output": str(tmp_path / "runs"),
        "quant__compute_dtype": "float32", "lora__r": 4, "lora__dropout": 0.1, "optim__lr": 5e-3,
        "train__steps": steps, "train__micro_batch_size": 2, "data__max_seq_len": 160, "train__save_every": 15,
        "train__keep": 2,
    }  # fmt: skip
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, KILLS, file, str(kills), str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, figure in found.items():
        record_property(name, figure)
    assert found["kills"] >= kills
    assert found["most_steps_repeated"] <= settings["train__save_every"]
