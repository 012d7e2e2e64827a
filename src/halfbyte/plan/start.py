"""Whether the base has the adapter that training is to begin at (lora.init): from its small files alone."""

from __future__ import annotations

from pathlib import Path

from halfbyte.config import LoraConfig
from halfbyte.config.model_config import read_model_config
from halfbyte.errors import ConfigError
from halfbyte.plan.files import locate

START = "start"
"""Folder beside a base's files: the adapter that training may begin at."""
CONFIG_KEY = "halfbyte_start"
"""In the config.json of a base that was written for one: {"init": ..., "r": ...}."""


def check_start(lora: LoraConfig, base: Path) -> None:
    """See that `lora` begins where the base in `base`, a folder or a .gguf file, lets it.

    Raises:
        ConfigError: the base was written for another start, or has none of this kind and rank.
        ModelError: a file of them cannot be read.
    """
    folder = base / START
    _check_left(lora, base)
    if lora.init == "random":
        return
    if not folder.is_dir():
        text = "quant.calibrate=FILE --set " if lora.init == "cloq" else ""
        raise ConfigError(
            "needs a start that was written with the base", where="lora.init", why=f"there is no {folder}",
            fix=f"Run: halfbyte quantize --model MODEL --output DIR --set {text}lora.init={lora.init}, and use DIR",
        )  # fmt: skip
    written = read_model_config(folder / "halfbyte.json").get("init", "cloq")  # the first there was, when none said it
    if written != lora.init:
        fix = f"Give --set lora.init={written}"
        raise ConfigError(f"is {lora.init}, {folder} is {written}", where="lora.init", fix=fix)
    rank = read_model_config(folder / "adapter_config.json").get("r")
    if rank != lora.r:
        raise ConfigError(
            f"is {lora.r}", where="lora.r", why=f"{folder} has rank {rank}",
            fix=f"Give --set lora.r={rank}, or quantize with --set lora.r={lora.r}",
        )  # fmt: skip


def check_rank(rank: int, largest: int) -> None:
    """ConfigError where adapters of `rank` are beyond every layer's, of which the `largest` is given."""
    if rank > largest:
        why = f"the model's largest layer has rank {largest}"
        raise ConfigError(f"{rank} is not possible", where="lora.r", why=why, fix="16 serves most models")


def check_whole(path: str) -> None:
    """ConfigError where the base called `path` is no model without an adapter."""
    base = locate(path)
    if _left_by(base) == "pissa":
        raise ConfigError(
            "is what PiSSA's start left of the model", where="model.path",
            why="the start has the largest part of every weight",
            fix=f"Give --adapter {base / START}, or one that began there",
        )  # fmt: skip


def _left_by(base: Path) -> str:
    """The start that the base was written for: pissa, loftq, or "" where it has no record of one."""
    written = read_model_config(base / "config.json").get(CONFIG_KEY) if base.is_dir() else None
    return str(written.get("init", "")) if isinstance(written, dict) else ""


def _check_left(lora: LoraConfig, base: Path) -> None:
    """ConfigError where the base is what a start left of the model, and the run begins elsewhere."""
    if _left_by(base) == "pissa" and lora.init != "pissa":
        raise ConfigError(
            f"is {lora.init}, the base was written for pissa", where="lora.init",
            why=f"without {base / START} it lacks the largest part of every weight",
            fix="Give --set lora.init=pissa, or another base",
        )  # fmt: skip
