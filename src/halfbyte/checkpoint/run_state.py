"""Checkpoints: everything a run needs to go on as if it had never stopped. Safetensors and JSON only.

checkpoint-<step>/
    adapter_model.safetensors, adapter_config.json, halfbyte.json     an adapter folder as PEFT reads it
    optimizer.safetensors     <parameter number>.<name>, as in Optimizer.state_dict()
    rng.safetensors           see rng.py
    run_state.json            step, cursor, config, hashes, environment, param_groups
    manifest.json
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.adapter import (
    CONFIG,
    INFO,
    WEIGHTS,
    Beside,
    check_adapter,
    read_tensors,
    versions,
    write_adapter,
)
from halfbyte.checkpoint.durable import recover, remove_folder, write_folder
from halfbyte.checkpoint.manifest import read_json, verify_folder
from halfbyte.checkpoint.shard_writer import Pieces, write_one
from halfbyte.errors import FileError, ResourceError
from halfbyte.kernels import panel_rule
from halfbyte.kernels.registry import cpu_choice

logger = logging.getLogger("halfbyte")

OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
RUN_STATE = "run_state.json"
_NAME = re.compile(r"checkpoint-(\d{1,12})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run after optimizer step `step`, as read from `path`. All tensors on the CPU, as saved to the bit.

    `optimizer` is what `Optimizer.load_state_dict` takes, `rng` what `restore_rng` takes, `cursor` what the data
    loader said, `config` is `to_dict(RunConfig)`, `hashes` name base, tokenizer and data, `environment` the machine.
    """

    path: Path
    step: int
    adapter: dict[str, Tensor]
    adapter_config: dict[str, Any]
    info: dict[str, Any]
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]
    cursor: dict[str, Any]
    config: dict[str, dict[str, Any]]
    hashes: dict[str, str]
    environment: dict[str, Any]


def save_checkpoint(
    output: str | Path,
    step: int,
    *,
    adapter: Mapping[str, Tensor],
    adapter_config: Mapping[str, Any],
    info: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    rng: Mapping[str, Tensor],
    cursor: Mapping[str, Any],
    config: Mapping[str, Any],
    hashes: Mapping[str, str],
    ranks: int = 1,
    beside: Beside | None = None,
) -> Path:
    """Write `checkpoint-<step>` under `output`, durably; an older one is replaced (set aside if it is not ours).

    Args:
        output: the run's folder.
        step: optimizer steps done.
        adapter, adapter_config, info: as `save_adapter`.
        optimizer: `Optimizer.state_dict()`; states are tensors, tensors in pieces, or numbers.
        rng: `capture_rng()`.
        cursor: where the data is, plain JSON.
        config: `to_dict(RunConfig)`.
        hashes: sha256 by name: base, tokenizer, data.
        ranks: processes that trained together.
        beside: as `save_adapter`.

    Raises:
        NumericsError: the adapter is not finite; nothing is written.
        ConfigError, ResourceError: a file has that name, the disk refuses; older checkpoints are as they were.
    """
    path = Path(output) / f"checkpoint-{step}"
    check_adapter(path, adapter, adapter_config)
    tensors, scalars = _flatten(optimizer["state"])
    state = {
        "step": step, "cursor": dict(cursor), "config": dict(config), "hashes": dict(hashes),
        "environment": environment() | {"ranks": ranks}, "param_groups": optimizer["param_groups"], "scalars": scalars,
    }  # fmt: skip
    parts: tuple[Mapping[str, Tensor | Pieces], ...] = adapter, tensors, rng
    expected = sum(tensor.nbytes for part in parts for tensor in part.values())
    with write_folder(path, expected_bytes=expected, set_aside=True) as writer:
        write_adapter(writer, adapter, adapter_config, info, beside)
        write_one(writer.path / OPTIMIZER, tensors)
        writer.write_tensors(RNG, rng)
        writer.write_json(RUN_STATE, state)
    return path


def checkpoint_origin(path: str | Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """`Checkpoint.config` and `environment`; nothing else is read or verified.

    Raises:
        FileError: it is not there, or not a checkpoint's.
    """
    state = read_json(Path(path) / RUN_STATE)
    try:
        return dict(state["config"]), dict(state["environment"])
    except (KeyError, TypeError, ValueError) as problem:
        raise FileError("is not a checkpoint's", where=str(Path(path) / RUN_STATE), why=repr(problem)) from None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Verify and read a checkpoint folder.

    Raises:
        FileError: not a checkpoint, or damaged; names the file.
        ConfigError: a newer halfbyte wrote it.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileError("there is no such checkpoint", where=str(path), fix="Give a folder named checkpoint-<step>")
    verify_folder(path)
    state = read_json(path / RUN_STATE)
    try:
        return Checkpoint(
            path=path,
            step=int(state["step"]),
            adapter=read_tensors(path / WEIGHTS),
            adapter_config=read_json(path / CONFIG),
            info=read_json(path / INFO),
            optimizer=_unflatten(read_tensors(path / OPTIMIZER), state["scalars"], state["param_groups"]),
            rng=read_tensors(path / RNG),
            cursor=state["cursor"],
            config=state["config"],
            hashes=state["hashes"],
            environment=state["environment"],
        )
    except (KeyError, TypeError, AttributeError) as problem:
        raise FileError("is not a checkpoint's", where=str(path / RUN_STATE), why=repr(problem)) from None


def latest_checkpoint(output: str | Path) -> Path | None:
    """The newest checkpoint under `output` whose every file verifies; None when there is none.

    Each damaged one that is passed over is named in a warning of the logger "halfbyte".

    Raises:
        ConfigError: a newer halfbyte wrote the newest one.
    """
    output = Path(output)
    if not output.is_dir():
        return None
    recover(output)
    for path in _numbered(output):
        if _is_good(path):
            return path
    return None


def prune_checkpoints(output: str | Path, keep: int, *, step: int | None = None) -> list[Path]:
    """Delete all but the newest `keep` checkpoints that verify. Call it when the new one is on disk.

    Those of later steps than `step`, the one just saved, are an earlier run's: they neither count nor go.

    What does not verify, holds files of the user's, or cannot be deleted (a warning says so) stays.

    Returns:
        The checkpoints deleted, newest first.
    """
    found = [path for path in _numbered(Path(output)) if step is None or _step_of(path) <= step]
    good = [path for path in found if (path / RUN_STATE).exists() and _is_good(path)]
    return [path for path in good[max(keep, 1) :] if _removed(path)]


def environment() -> dict[str, Any]:
    """What else decides the last bit of a result: versions, processor, kernels, threads."""
    library = cpu_choice().library
    return {
        **versions(),
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "isa": "reference" if library is None else library.isa,
        "panel_rows": panel_rule().rows,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def environment_changes(checkpoint: Checkpoint, ranks: int = 1) -> list[str]:
    """What differs from the machine that wrote `checkpoint`, and its ranks: if any, going on is not promised to be
    bit-exact."""
    before, now = {"ranks": 1} | checkpoint.environment, environment() | {"ranks": ranks}
    return [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]


def _removed(path: Path) -> bool:
    try:
        return remove_folder(path)
    except ResourceError as error:  # the new checkpoint is good all the same
        logger.warning("%s is not deleted: %s", path.name, error)
        return False


def _numbered(output: Path) -> list[Path]:
    """Folders named checkpoint-<step>, newest first."""
    found = [(int(match[1]), path) for path in output.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir() and not path.is_symlink()]


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _is_good(path: Path) -> bool:
    try:
        verify_folder(path)
    except FileError as error:
        logger.warning("%s is passed over: %s", path.name, error)
        return False
    return True


def _flatten(state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Tensor | Pieces], dict[str, float]]:
    tensors: dict[str, Tensor | Pieces] = {}
    scalars: dict[str, float] = {}
    for number, entries in state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor | Pieces):
                tensors[f"{number}.{name}"] = value
            else:
                assert isinstance(value, int | float), f"optimizer state {name} is a {type(value).__name__}"
                scalars[f"{number}.{name}"] = value
    return tensors, scalars


def _unflatten(
    tensors: Mapping[str, Tensor], scalars: Mapping[str, float], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *scalars.items()):
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    restored = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in groups]
    return {"state": dict(sorted(state.items())), "param_groups": restored}
