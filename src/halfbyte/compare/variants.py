"""What is compared: ways to hold the base and to train on it, each a name and the settings it stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.config.formats import QUANT_TYPES, bits_of
from halfbyte.config.load import nearest
from halfbyte.errors import ConfigError

LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
"""Llama's, and of all models with its names: what is left in 16 bits has to be named."""


SET_BY_COMPARE = ("train.seed", "train.output", "train.resume", "data.train", "data.eval")
"""The same for all, or a run's own."""


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        name: in tables and file names.
        about: a few words for people.
        settings: "section.key=value" over those of the run; {data} stands for the training samples.
        full: all weights are trained, without adapter or quantization.
    """

    name: str
    about: str
    settings: tuple[str, ...] = ()
    full: bool = False


_CALIBRATED = "quant.calibrate={data}"
_PUBLISHED = "quant.scale=absmax"
"""A block's scale as the formats of 4 bits were published with."""
BUILT_IN = {
    variant.name: variant
    for variant in (
        Variant("full", "all weights, in 32 bits, a tenth of the learning rate", full=True),
        Variant(
            "16bit", "LoRA on the 16-bit base",
            (f"quant.skip_modules={LINEARS}", f"lora.target_modules={LINEARS}"),
        ),
        Variant("nf4", "NF4, double quantization: QLoRA as published", (_PUBLISHED,)),
        Variant("nf4-single", "NF4, scales in 32 bits", (_PUBLISHED, "quant.double_quant=false")),
        Variant("nf4-mse", "NF4, scales of least error", ("quant.scale=mse",)),
        Variant("nf4-signed", "NF4, scales of least error and either sign", ("quant.scale=mse-signed",)),
        Variant("nf4-calibrated", "NF4, codes chosen on the training data", (_CALIBRATED,)),
        Variant(
            "nf4-start", "NF4, codes and the adapter's start chosen on the training data",
            (_CALIBRATED, "lora.init=cloq"),
        ),
        *(
            Variant(
                name, f"{name.upper()}, double quantization",
                (f"quant.quant_type={name}", *([_PUBLISHED] if bits_of(name) >= 4 else [])),
            )
            for name in QUANT_TYPES if name != "nf4"
        ),
    )
}  # fmt: skip


def chosen(names: str, own: Sequence[str]) -> list[Variant]:
    """The built-in variants named in `names` (commas between), then the user's `own`.

    Args:
        own: each "NAME:section.key=value,section.key=value"; a NAME alone means the run as it is set.

    Raises:
        ConfigError: an unknown or repeated name, or nothing to compare with.
    """
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in BUILT_IN:
            raise ConfigError(f"unknown variant {name!r}", where="--variants", fix=nearest(name, BUILT_IN) or _known())
        found.append(BUILT_IN[name])
    found += [_own(text) for text in own]
    names_found = [variant.name for variant in found]
    if twice := {name for name in names_found if names_found.count(name) > 1}:
        raise ConfigError(f"{min(twice)!r} is there twice", where="--variants")
    if len(found) < 2:
        raise ConfigError("a comparison takes two variants", where="--variants", fix=_known())
    return found


def _known() -> str:
    return f"Choose from {', '.join(BUILT_IN)}"


def _own(text: str) -> Variant:
    name, _, rest = text.partition(":")
    # A comma begins another setting only where one follows: values may be lists.
    settings = tuple(re.split(r",(?=\w+\.\w+=)", rest)) if rest else ()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", name) or name in BUILT_IN:
        raise ConfigError(
            f"cannot name a variant {name!r}", where="--variant",
            fix="Give NAME:section.key=value,..., NAME of letters, digits and ._-, and not a built-in one",
        )  # fmt: skip
    if fixed := [key for key in SET_BY_COMPARE if any(setting.startswith(key + "=") for setting in settings)]:
        raise ConfigError(f"sets {fixed[0]}, which compare sets itself", where=f"--variant {name}")
    if bad := [setting for setting in settings if not re.match(r"\w+\.\w+=", setting)]:
        raise ConfigError(f"cannot read {bad[0]!r}", where="--variant", fix="Settings are section.key=value")
    return Variant(name, ", ".join(settings) or "the run as it is set", settings)
