"""What is saved while things go wrong: how it was before, the save, and which of the two a folder holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint import (
    latest_checkpoint,
    load_adapter,
    load_checkpoint,
    prune_checkpoints,
    save_adapter,
    save_checkpoint,
    write_file,
)
from halfbyte.checkpoint.durable import recover

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


@dataclass(frozen=True)
class Scenario:
    """A save.

    Attributes:
        prepare: makes what was there before, in an empty folder.
        act: saves the new.
        read: which of the two is there, "old" or "new", after whatever recovery the reader does; anything else fails.
    """

    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    read: Callable[[Path], str]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """An adapter's, of a few hundred numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {A: torch.randn(2, 40, generator=generator), B: torch.randn(30, 2, generator=generator)}


def _save_checkpoint(root: Path, step: int) -> None:
    adapter = tensors(step)
    state = {number: {"exp_avg": tensor + 1, "step": float(step)} for number, tensor in enumerate(adapter.values())}
    save_checkpoint(
        root / "run", step, adapter=adapter, adapter_config=CONFIG, info={"base_sha256": "aa" * 32},
        optimizer={"state": state, "param_groups": [{"params": [0, 1], "lr": 0.1}]},
        rng={"python": torch.arange(9)}, cursor={"seed": 0, "epoch": 0, "index": step}, config={}, hashes={},
    )  # fmt: skip


def _next_checkpoint(root: Path) -> None:
    _save_checkpoint(root, 2)
    prune_checkpoints(root / "run", 1, step=2)


def _read_checkpoint(root: Path) -> str:
    path = latest_checkpoint(root / "run")
    assert path is not None, "no checkpoint is left"
    saved = load_checkpoint(path)
    expected = tensors(saved.step)
    assert all(torch.equal(saved.adapter[name], expected[name]) for name in expected)
    assert torch.equal(saved.optimizer["state"][1]["exp_avg"], expected[B] + 1)
    assert saved.cursor["index"] == saved.step
    return {1: "old", 2: "new"}[saved.step]


def _save_adapter(root: Path, seed: int) -> None:
    save_adapter(root / "run" / "adapter", tensors(seed), CONFIG, {"seed": seed})


def _read_adapter(root: Path) -> str:
    adapter = load_adapter(root / "run" / "adapter")
    seed = int(adapter.info["seed"])
    assert all(torch.equal(adapter.state[name], tensor) for name, tensor in tensors(seed).items())
    return {1: "old", 2: "new"}[seed]


def _read_new_adapter(root: Path) -> str:
    if (root / "run").is_dir():
        recover(root / "run")
    return _read_adapter(root) if (root / "run" / "adapter").exists() else "old"


def _write_result(root: Path, text: str) -> None:
    write_file(root / "result.json", text.encode() * 600)


def _read_result(root: Path) -> str:
    text = (root / "result.json").read_bytes()
    return {b"old" * 600: "old", b"new" * 600: "new"}[text]


def _nothing(root: Path) -> None:
    pass


SCENARIOS = {
    "checkpoint": Scenario(lambda root: _save_checkpoint(root, 1), _next_checkpoint, _read_checkpoint),
    "replaced adapter": Scenario(
        lambda root: _save_adapter(root, 1), lambda root: _save_adapter(root, 2), _read_adapter
    ),
    "first adapter": Scenario(_nothing, lambda root: _save_adapter(root, 2), _read_new_adapter),
    "one file": Scenario(
        lambda root: _write_result(root, "old"), lambda root: _write_result(root, "new"), _read_result
    ),
}


def quiet() -> None:
    """Damaged checkpoints are passed over with a warning each: thousands here."""
    logging.getLogger("halfbyte").setLevel(logging.ERROR)


def names_below(root: Path) -> list[str]:
    """Everything in `root`, sorted."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def outcome(error: BaseException | None) -> dict[str, Any]:
    """For JSON: the kind of an error, its exit code and its text; the code is 0 without one."""
    if error is None:
        return {"code": 0, "kind": "", "text": ""}
    return {"code": getattr(error, "exit_code", 1), "kind": type(error).__name__, "text": str(error)}
