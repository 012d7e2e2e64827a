"""What can be wrong with a run, as far as that shows without torch and without reading data or weights: in no time."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from halfbyte.config import RunConfig
from halfbyte.config.names import check_skipped, check_targets
from halfbyte.config.schema import check_chosen, check_stored
from halfbyte.config.target import check_parent, check_target
from halfbyte.errors import ConfigError, DataError, FileError, ModelError
from halfbyte.plan.architecture import FUSED
from halfbyte.plan.base import EMBEDDINGS, HEADS, Base, read_base
from halfbyte.plan.files import locate
from halfbyte.plan.start import check_rank, check_start

FLAGS = {"model.path": "--model", "data.train": "--data", "train.output": "--output"}


def check_run(config: RunConfig) -> None:
    """See that `config` names a model, data and an output that can be used, and layers that the model has.

    Raises:
        ConfigError, FileError, ResourceError: the first thing that is wrong.
    """
    for key, flag in FLAGS.items():
        if not _value(config, key):
            raise ConfigError("is not set", where=key, fix=f"Give {flag}")
    check_parent(Path(config.train.output))
    check_target(Path(config.train.output) / "adapter")
    for key in ("data.train", "data.eval"):
        if _value(config, key):
            _check_data(_value(config, key), key)
    resume = config.train.resume
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise FileError(
            "no such checkpoint", where=resume, fix="Give its folder, or auto for the newest in train.output"
        )
    folder = locate(config.model.path)
    with suppress(ModelError):  # who reads the whole model says it better
        base = read_base(config.model.path, config.quant, "float32")
        check_layers(config, base)
        check_rank(config.lora.r, max(map(min, base.architecture.linears.values())))
        if base.exact:
            _check_stored(config, base)
            check_start(config.lora, folder)
    if config.lora.r > config.limits.rank:
        raise ConfigError(
            f"{config.lora.r} is not possible", where="lora.r", why=f"limits.rank is {config.limits.rank}",
            fix=f"Lower it, or give --set limits.rank={config.lora.r} here and where the adapter is used",
        )  # fmt: skip


def check_layers(config: RunConfig, base: Base) -> None:
    """See that `base` has the layers that settings name, where it is known which it has.

    Of a family that halfbyte does not know, transformers may rename what the file holds: only last parts count there.

    Raises:
        ConfigError: a name matches none.
    """
    for name in map(_last, config.lora.modules_to_save):
        if name not in (*EMBEDDINGS, *HEADS):
            raise ConfigError(
                f"{name!r} cannot be trained whole", where="lora.modules_to_save",
                fix="Name the input embedding (embed_tokens) and the output head (lm_head), or either",
            )  # fmt: skip
    whole = {_last(name) in HEADS for name in config.lora.modules_to_save}
    if base.architecture.tied and len(whole) == 1:
        raise ConfigError(
            f"{config.lora.modules_to_save[0]} alone cannot be trained whole", where="lora.modules_to_save",
            why="embedding and head are one table in this model", fix="Name both, or none",
        )  # fmt: skip
    names, skipped, wanted = set(base.linear_names), config.quant.skip_modules, config.lora.target_modules
    experts = {_last(name) for name in names if ".experts." in name}
    if not names:
        return
    if base.architecture.family in FUSED:
        names |= {"model." + name for name in names}  # stored without
    else:
        names, skipped = {_last(name) for name in names}, tuple(map(_last, skipped))
        wanted = wanted if isinstance(wanted, str) else tuple(map(_last, wanted))
    check_skipped(skipped, {*names, *HEADS})
    check_targets(wanted, names - experts, experts)


def _check_stored(config: RunConfig, base: Base) -> None:
    """ConfigError where settings are for a base that is stored quantized, and this one is not."""
    path, weights = config.model.path, config.memory.weights
    if config.train.sharding == "full" and weights != "resident":
        raise ConfigError(
            f"{weights!r} and train.sharding=full are not possible together", where="memory.weights",
            fix="Set memory.weights to resident, or train.sharding to none",
        )  # fmt: skip
    if config.train.sharding == "full" and not base.in_4_bits:
        raise ConfigError(
            f"'full' shares the stored bytes of a base, and {path} is not stored quantized", where="train.sharding",
            fix=f"Run: halfbyte quantize --model {path} --output DIR, and train on DIR",
        )  # fmt: skip
    check_stored(weights, path, in_4_bits=base.in_4_bits)
    check_chosen(config.quant, path, in_4_bits=base.in_4_bits)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _check_data(path: str, key: str) -> None:
    if not Path(path).exists():
        raise DataError(
            "no such file", where=path, fix=f"Give a file of JSON lines as {key} (docs/data.md has an example)"
        )
    if Path(path).is_dir():
        raise DataError("is a folder, not a file of JSON lines", where=path, fix=f"Give one of its files as {key}")


def _value(config: RunConfig, key: str) -> str:
    section, _, name = key.partition(".")
    return str(getattr(getattr(config, section), name))
