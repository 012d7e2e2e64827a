"""The adapter that training may begin at, in a folder beside the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.checkpoint.adapter import write_adapter
from halfbyte.checkpoint.durable import FolderWriter
from halfbyte.config import LoraConfig
from halfbyte.model.adapt import peft_config
from halfbyte.model.quantize import Unquantized
from halfbyte.model.targets import modules_to_adapt
from halfbyte.plan.start import START, check_rank


def ranks_of(job: Unquantized, lora: LoraConfig) -> dict[str, int]:
    """Of the parameters whose layers get an adapter to begin at.

    Raises:
        ConfigError: there is no such layer, or none has this rank.
    """
    wanted = set(modules_to_adapt(job.model, lora.target_modules))
    names = [f"{name}.weight" for name in job.targets if name in wanted]
    check_rank(lora.r, max((min(job.model.get_parameter(name).shape) for name in names), default=lora.r))
    return dict.fromkeys(names, lora.r)


def write_start(
    base: Path, job: Unquantized, lora: LoraConfig, starts: Mapping[str, tuple[Tensor, Tensor]], info: dict[str, Any]
) -> None:
    """The adapter whose updates are ``B A`` of `starts`, as a folder in `base` that PEFT reads."""
    state: dict[str, Tensor] = {}
    for name, (a, b) in starts.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        state |= {f"{prefix}A.weight": a.contiguous(), f"{prefix}B.weight": (b / lora.scaling).contiguous()}
    names = [name.removesuffix(".weight") for name in starts]
    path = base / START
    path.mkdir()
    write_adapter(
        FolderWriter(path), state, peft_config(job.model, lora, names).to_dict(), {**info, "init": lora.init}
    )
