"""PEFT's adapter folder: what `PeftModel.from_pretrained` reads, with halfbyte's record of where it came from beside.

adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, in), ....lora_B.weight (out, r),
                            of DoRA ....lora_magnitude_vector (out), rows of tokens and whole tables: rows.py
adapter_config.json         PEFT's LoraConfig
halfbyte.json               base_sha256, base, quant, chat_template, tokenizer_sha256, mask_policy, config, versions
tokenizer.json, ...         where tokens were added to the base's
manifest.json               sizes and sha256 of the above
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from halfbyte.checkpoint.durable import FolderWriter, recover, write_folder
from halfbyte.checkpoint.manifest import read_json, verify_folder
from halfbyte.checkpoint.rows import module_of, row_problems
from halfbyte.config.limits import check_limit
from halfbyte.errors import AdapterError, FileError, NumericsError, read_error

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
INFO = "halfbyte.json"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
MAGNITUDE = ".lora_magnitude_vector"
"""How the name of a magnitude ends, (out,): DoRA's."""
_SHOWN = 5
_UNSUPPORTED = (
    "lora_bias", "target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
Beside = Callable[[Path], None]
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter as read: tensors by PEFT's names (CPU), PEFT's config, and halfbyte.json (empty from plain PEFT)."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    info: dict[str, Any]
    folder: Path


def save_adapter(
    folder: str | Path, state: Mapping[str, Tensor], peft_config: Mapping[str, Any], info: Mapping[str, Any],
    beside: Beside | None = None,
) -> None:  # fmt: skip
    """Write an adapter folder, durably; an older one of ours is replaced.

    Args:
        folder: where; made with its parents.
        state: A (r, in) and B (out, r) by PEFT's names (`base_model.model.<module>.lora_A.weight`), any float dtype.
        peft_config: `LoraConfig.to_dict()`.
        info: what halfbyte.json says (module docstring); plain JSON values.
        beside: writes into the folder what it is to hold besides.

    Raises:
        NumericsError: a tensor is not finite; nothing is written.
        AdapterError: tensors and config do not fit each other; nothing is written.
        ConfigError, ResourceError: as `write_folder`.
    """
    check_adapter(folder, state, peft_config)
    with write_folder(folder, expected_bytes=sum(tensor.nbytes for tensor in state.values())) as writer:
        write_adapter(writer, state, peft_config, info, beside)


def write_adapter(
    writer: FolderWriter, state: Mapping[str, Tensor], peft_config: Mapping[str, Any], info: Mapping[str, Any],
    beside: Beside | None = None,
) -> None:  # fmt: skip
    """The files of an adapter, into a folder that is being written (a checkpoint is an adapter with more)."""
    write_peft(writer, state, peft_config)
    writer.write_json(INFO, info)
    if beside is not None:
        beside(writer.path)


def write_peft(writer: FolderWriter, state: Mapping[str, Tensor], peft_config: Mapping[str, Any]) -> None:
    """The two of them that are PEFT's."""
    config = {key: _plain(value) for key, value in peft_config.items()}
    writer.write_tensors(WEIGHTS, state)
    writer.write_json(CONFIG, {**config, "inference_mode": True})


def check_adapter(where: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """NumericsError for values that are not finite, AdapterError for all else that `problems` finds."""
    bad = _not_finite(state)
    if bad:
        raise NumericsError(_list_some("tensors are not finite", bad), where=str(where), why="training diverged",
                            fix="Lower optim.lr and go on from the last checkpoint")  # fmt: skip
    found = problems(state, config)
    if found:
        raise AdapterError(_list_some("faults" if len(found) > 1 else "fault", found), where=str(where))


def load_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter folder, ours or plain PEFT's.

    Returns:
        The adapter; its tensors are private copies on the CPU, of the dtype in the file.

    Raises:
        AdapterError: not an adapter, a pickle, damaged, not LoRA on linear layers, tensors and config do not fit,
            values that are not finite; all problems of one kind at once.
    """
    folder = Path(folder)
    if not folder.is_dir():
        recover(folder.parent)
    if not folder.is_dir():
        raise AdapterError("there is no such folder", where=str(folder), fix="Give a folder that holds an adapter")
    weights = folder / WEIGHTS
    if not weights.exists():
        raise AdapterError(f"no {WEIGHTS}", where=str(folder), **_pickle_hint(folder))
    verify_folder(folder, required=False, error=AdapterError)
    config = read_json(folder / CONFIG, error=AdapterError)
    if type(config.get("r")) is int:
        check_limit("rank", config["r"], "as rank", folder / CONFIG, AdapterError)
    check_limit("adapter_bytes", weights.stat().st_size, "bytes", weights, AdapterError)
    state = read_tensors(weights, error=AdapterError)
    info = read_json(folder / INFO, error=AdapterError) if (folder / INFO).exists() else {}
    found = problems(state, config) + [f"{name} is not finite" for name in _not_finite(state)]
    if found:
        raise AdapterError(_list_some("faults" if len(found) > 1 else "fault", found), where=str(folder))
    return Adapter(state=state, config=config, info=info, folder=folder)


def stored_size(folder: Path) -> tuple[int, int]:
    """Numbers in an adapter's tensors, by its header, and bytes of the file; zeros where `load_adapter` says what is
    wrong."""
    path, numbers = folder / WEIGHTS, 0
    with suppress(OSError, SafetensorError):
        with safe_open(path, framework="pt") as file:
            numbers = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no dict)
        return numbers, path.stat().st_size
    return 0, 0


def check_base(
    adapter: Adapter,
    base_sha256: str,
    *,
    base: str = "",
    quant: Mapping[str, Any] | None = None,
    tokenizer_sha256: str | None = None,
    chat_template: str | None = None,
) -> list[str]:
    """Check that `adapter` was trained on this base.

    Args:
        adapter: as read.
        base_sha256: content hash of the base at hand.
        base: its name or path, for the message.
        quant, tokenizer_sha256, chat_template: compared too when given (a merge onto 16-bit weights gives no `quant`).

    Returns:
        Notes for the user, one sentence each: what could not be checked.

    Raises:
        AdapterError: names both sides of everything that differs.
    """
    if not adapter.info.get("base_sha256"):
        return [f"{adapter.folder}: no record of the base it was trained on, so the match with {base} is not checked"]
    here = {
        "base_sha256": base_sha256, "quant": None if quant is None else dict(quant),
        "tokenizer_sha256": tokenizer_sha256, "chat_template": chat_template,
    }  # fmt: skip
    differ, notes = [], []
    same_bytes = adapter.info["base_sha256"] == base_sha256
    for key, mine in here.items():
        theirs = adapter.info.get(key)
        if mine is None:
            continue
        if theirs is None:
            notes.append(f"{adapter.folder}: no record of its {key}, which is not checked")
        elif theirs != mine and not (key == "quant" and same_bytes and _but_scale(theirs) == _but_scale(mine)):
            differ.append(f"{key} {_short(theirs)} there, {_short(mine)} here")
    if differ:
        raise AdapterError(
            f"was trained on {adapter.info.get('base') or 'another base'}, not on {base or 'this one'}",
            where=str(adapter.folder), why="; ".join(differ), fix="Give the base that the adapter was trained on",
        )  # fmt: skip
    return notes


def _but_scale(recipe: Any) -> Any:
    """Bytes show their kind of scale; who recorded them may not have looked."""
    return {key: value for key, value in recipe.items() if key != "scale"} if isinstance(recipe, dict) else recipe


def read_tensors(path: Path, *, error: type[FileError] = FileError) -> dict[str, Tensor]:
    """All tensors of one safetensors file, read (not mapped); `error` names the file when it is something else."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
            raise error("is a pickle under a safetensors name", where=str(path), why="a pickle can run code when read")
        with safe_open(path, framework="pt") as file:
            check_limit("tensors", len(list(file.keys())), "tensors", path, error)
        tensors: dict[str, Tensor] = load_file(path, backend="pread")
        return tensors
    except SafetensorError as problem:
        raise error("is not a safetensors file", where=str(path), why=str(problem)) from None
    except OSError as problem:
        raise read_error(error, path, problem) from None


def problems(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    """What keeps `state` and `config` from being LoRA on linear layers, a phrase each; empty when nothing does."""
    found = _config_problems(config) + row_problems(state, config)
    dora = bool(config.get("use_dora"))
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _KEY.fullmatch(name)
        if match is None and module_of(name, config) is not None:
            continue
        if dora and name.endswith(MAGNITUDE):
            other = state.get(name.removesuffix(MAGNITUDE) + ".lora_B.weight")
            if other is None or tensor.shape != other.shape[:1] or not tensor.is_floating_point():
                found.append(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not a float for each row of lora_B")
        elif match is None:
            found.append(f"unknown tensor {name}")
        elif tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.numel():
            found.append(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not a matrix of floats")
        else:
            pairs.setdefault(match[1], {})[match[2]] = tensor
    if not state:
        found.append("no tensors")
    for module, pair in pairs.items():
        if len(pair) == 1:
            found.append(f"{module} has lora_{next(iter(pair))} alone")
            continue
        shape, rank = (pair["A"].shape[0], pair["B"].shape[1]), _rank(config, module)
        if dora and f"base_model.model.{module}{MAGNITUDE}" not in state:
            found.append(f"{module} has no magnitude, use_dora is true in {CONFIG}")
        if shape != (rank, rank):
            found.append(f"{module} has rank {shape[0]} in lora_A, {shape[1]} in lora_B, {rank} in {CONFIG}")
    return found


def pairs(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (r, in), B (out, r) and the scaling of ``B A`` for each module of a checked adapter, as PEFT scales it."""
    found = {}
    for name, lora_A in adapter.state.items():
        match = _KEY.fullmatch(name)
        if match is None or match[2] != "A":
            continue
        rank = lora_A.shape[0]
        alpha = _by_pattern(adapter.config.get("alpha_pattern"), match[1], adapter.config["lora_alpha"])
        root = math.sqrt(rank) if adapter.config.get("use_rslora") else rank
        found[match[1]] = (lora_A, adapter.state[name.replace(".lora_A.", ".lora_B.")], float(alpha) / root)
    return found


def versions() -> dict[str, str]:
    """Versions of what shapes an adapter, for halfbyte.json."""
    found = {}
    for package in ("halfbyte", "torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    if _plain(config.get("peft_type")) != "LORA":
        return [f"peft_type is {config.get('peft_type')!r}, only LORA is supported"]
    found = [f"{key} is not supported" for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']!r} is not supported")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_CHANGES_BASE):
        found.append(f"init_lora_weights {init!r} needs a changed base (PEFT's save_pretrained can convert it)")
    try:
        for pattern in config.get("rank_pattern") or {}:
            re.compile(pattern)
    except (re.error, TypeError):
        found.append(f"rank_pattern {config['rank_pattern']!r} is not a table of patterns")
    if type(config.get("r")) is not int or config["r"] < 1:
        found.append(f"r is {config.get('r')!r}, not a rank")
    if not isinstance(config.get("lora_alpha"), int | float):
        found.append(f"lora_alpha is {config.get('lora_alpha')!r}, not a number")
    return found


def _rank(config: Mapping[str, Any], module: str) -> Any:
    return _by_pattern(config.get("rank_pattern"), module, config.get("r"))


def _by_pattern(table: Any, module: str, default: Any) -> Any:
    """What `table` says of `module`, as PEFT's get_pattern_key finds it."""
    for pattern, value in table.items() if isinstance(table, dict) else ():
        with suppress(re.error):
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
    return default


def _not_finite(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]


def _list_some(what: str, items: Sequence[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {what}: {'; '.join(items[:_SHOWN])}{more}"


def _plain(value: Any) -> Any:
    """As JSON has it: sets sorted, enums by value (JSON itself turns tuples into lists)."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"


def _pickle_hint(folder: Path) -> dict[str, str]:
    if not any((folder / name).exists() for name in ("adapter_model.bin", "adapter_model.pt")):
        return {"fix": "Give a folder that holds an adapter"}
    return {
        "why": "adapter_model.bin is a pickle, which can run code when it is read, and is refused",
        "fix": "Load it with PEFT where you trust it, then save_pretrained() writes safetensors",
    }
