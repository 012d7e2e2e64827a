"""What a run is asked to do: frozen, keyword-only dataclasses and the one table of defaults.

The string under a field is its help text everywhere: ``--help``, ``--set`` errors, the docs.
Defaults follow the QLoRA paper (arXiv 2305.14314, §4 and appendix B) unless the help says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from halfbyte.config.base import LoraConfig, ModelConfig, QuantConfig
from halfbyte.config.limits import LimitsConfig
from halfbyte.config.running import DataConfig, LogConfig, MemoryConfig, OptimConfig, TrainConfig, warmup_of
from halfbyte.errors import ConfigError


def check_warmup(optim: OptimConfig, steps: int) -> None:
    """See that the learning rate is reached within `steps`.

    Raises:
        ConfigError: it is not.
    """
    warmup = warmup_of(optim.warmup_steps, steps)
    if warmup >= steps + (optim.schedule == "constant"):
        raise ConfigError(
            f"{warmup} warm-up steps leave nothing of {steps} steps",
            where="optim.warmup_steps", fix="Lower optim.warmup_steps or raise train.steps",
        )  # fmt: skip


def check_stored(weights: str, path: str, *, in_4_bits: bool) -> None:
    """See that there is a file with the very bytes that are used, where `weights` are not resident.

    Raises:
        ConfigError: the base called `path` is quantized while it is loaded, so there is none.
    """
    if weights != "resident" and not in_4_bits:
        raise ConfigError(
            f"is not stored quantized, so its weights cannot be left on disk ({weights})", where=path,
            fix=f"Run: halfbyte quantize --model {path} --output DIR, and train on DIR",
        )  # fmt: skip


def check_chosen(quant: QuantConfig, path: str, *, in_4_bits: bool) -> None:
    """See that what `halfbyte quantize` chooses is not asked of a base that is quantized while it is loaded.

    Raises:
        ConfigError: it is, for the base called `path`.
    """
    if (quant.calibrate or quant.bits) and not in_4_bits:
        key, value = ("calibrate", "FILE") if quant.calibrate else ("bits", f"{quant.bits:g}")
        raise ConfigError(
            "is chosen once, when the model is quantized to a folder", where=f"quant.{key}",
            fix=f"Run: halfbyte quantize --model {path} --output DIR --set quant.{key}={value}, and use DIR",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One fine-tuning run. Sections are the tables of the TOML file; see each for its keys."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    log: LogConfig = field(default_factory=LogConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def __post_init__(self) -> None:
        if self.train.steps:
            check_warmup(self.optim, self.train.steps)
        output = self.train.output
        if output and Path(output).is_file():
            raise ConfigError("the output is a file", where=output, fix="Give a folder as train.output")


def require_config(config: object) -> None:
    """See that a caller in Python did not give a model's path, say.

    Raises:
        TypeError: it is no RunConfig.
    """
    if not isinstance(config, RunConfig):
        raise TypeError(
            f"a RunConfig is needed, not {config!r}; "
            'halfbyte.load_config(model__path="DIR") makes one, with any other setting by section__name'
        )


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Plain nested dict of `config`, tuples as lists (for JSON and for comparing runs)."""
    return {
        section.name: {
            f.name: list(value) if isinstance(value := getattr(part, f.name), tuple) else value for f in fields(part)
        }
        for section in fields(config)
        for part in (getattr(config, section.name),)
    }
