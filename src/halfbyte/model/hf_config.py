"""HalfbyteConfig: what `from_pretrained(..., quantization_config=...)` takes in place of BitsAndBytesConfig.

Importing this module registers both halves, config and quantizer, with transformers, by its public functions.

A model saved with `save_pretrained` is a bitsandbytes folder, and its config.json says so, so that everything that
reads bitsandbytes reads it. transformers therefore opens such a folder with bitsandbytes, unless it is told otherwise:

    from_pretrained(folder)                                         bitsandbytes' layers
    from_pretrained(folder, quantization_config=HalfbyteConfig())   ValueError from transformers: the folder names
                                                                    BitsAndBytesConfig, the argument HalfbyteConfig
    from_pretrained(folder, config=prequantized_config(folder))     our layers, over the bytes of the folder

transformers compares the two configs' class names before any quantizer is asked; the config is the one public way in.
A codebook that bitsandbytes does not have, or a mixture's experts in 4 bits, make a folder of our own: from_pretrained
opens it once this is imported.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, Self, get_args

import torch
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

import halfbyte.model.hf_quantizer  # noqa: F401  (registers it)
from halfbyte.config.base import BLOCKSIZES, Scale
from halfbyte.config.formats import BNB_TYPES, QUANT_TYPES
from halfbyte.dtypes import COMPUTE_DTYPES
from halfbyte.errors import ConfigError, ModelError
from halfbyte.model.source import METHOD, is_four_bit

_EIGHT_BIT = {
    "load_in_8bit": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
}
"""BitsAndBytesConfig's keywords that mean nothing in 4 bits, with the only value they may have."""

_KEYWORDS = (
    "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage", "llm_int8_skip_modules", "blocksize", "scale", "layers",
)  # fmt: skip


_OURS = {
    "quant_type": "bnb_4bit_quant_type", "blocksize": "blocksize", "double_quant": "bnb_4bit_use_double_quant",
    "compute_dtype": "bnb_4bit_compute_dtype", "skip_modules": "llm_int8_skip_modules", "layers": "layers",
}  # fmt: skip
"""The keywords as a folder names them that is not bitsandbytes'."""


class HalfbyteConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How the linear layers of a transformers model are held in 4 bits.

    Args:
        load_in_4bit: True; here so that a BitsAndBytesConfig call needs no other change.
        bnb_4bit_quant_type: "nf4", "fp4" (bitsandbytes' own default), or a codebook that only halfbyte reads:
            "int4", "int4-asym", "af4", "bof4", "bof4-s".
        bnb_4bit_use_double_quant: quantize the scales themselves to 8 bits (bitsandbytes' own default: no).
        bnb_4bit_compute_dtype: what matrix products run in: float32, bfloat16 or float16, as torch's dtype or its
            name; None or "auto" takes the dtype of the layer's input (bitsandbytes' own default: float32).
        bnb_4bit_quant_storage: uint8, the only one.
        llm_int8_skip_modules: linear layers to leave as they are, by full name or last part, beside the output
            head and what is tied to it, which always are.
        blocksize: weights that share one scale: 32 to 4096, a power of two.
        scale: "auto", "absmax" (bitsandbytes' own bytes), "mse" or "mse-signed", as `halfbyte.quantize` has them. It
            is not saved: what is saved has its scales.
        layers: formats of single layers, by full name; what `halfbyte quantize` with `quant.bits` writes.

    Raises:
        ConfigError: a keyword is unknown, belongs to 8 bits, or has a value that is not possible.
    """

    def __init__(
        self,
        load_in_4bit: bool = True,
        bnb_4bit_quant_type: str = "nf4",
        bnb_4bit_use_double_quant: bool = True,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        llm_int8_skip_modules: list[str] | None = None,
        blocksize: int = 64,
        scale: str = "auto",
        layers: Mapping[str, str] | None = None,
        **other: Any,
    ) -> None:
        for key, value in other.items():
            _refuse_other(key, value)
        if load_in_4bit is not True:
            raise ConfigError(
                f"{load_in_4bit!r} is not possible", where="load_in_4bit",
                why="halfbyte quantizes weights", fix="Leave quantization_config out to load a model as it is",
            )  # fmt: skip
        _require_choice("bnb_4bit_quant_type", bnb_4bit_quant_type, QUANT_TYPES)
        _require_choice("bnb_4bit_use_double_quant", bnb_4bit_use_double_quant, (True, False))
        _require_choice("blocksize", blocksize, BLOCKSIZES)
        _require_choice("scale", scale, get_args(Scale))
        _require_choice("bnb_4bit_quant_storage", _dtype_name(bnb_4bit_quant_storage), ("uint8", None))
        compute = _dtype_name(bnb_4bit_compute_dtype)
        _require_choice("bnb_4bit_compute_dtype", compute, (*COMPUTE_DTYPES, "auto", None))
        if isinstance(llm_int8_skip_modules, str):
            raise ConfigError("is one string", where="llm_int8_skip_modules", fix="Give a list of module names")
        self.quant_method = METHOD
        self.bnb_4bit_quant_type = bnb_4bit_quant_type
        self.bnb_4bit_use_double_quant = bnb_4bit_use_double_quant
        self.bnb_4bit_compute_dtype = None if compute in (None, "auto") else getattr(torch, compute)
        self.llm_int8_skip_modules = None if llm_int8_skip_modules is None else list(llm_int8_skip_modules)
        self.blocksize, self.scale = blocksize, scale
        self.layers = {name: kind for name, kind in (layers or {}).items() if kind != bnb_4bit_quant_type}
        for name, kind in self.layers.items():
            _require_choice(f"layers: {name}", kind, QUANT_TYPES)
        self.is_ours = bool(self.layers) or bnb_4bit_quant_type not in BNB_TYPES
        """Whether a folder with these settings is not one that bitsandbytes reads."""
        self._model_dtype: torch.dtype | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a `quantization_config` of a config.json, ours or bitsandbytes'; `kwargs` go over it.

        Returns:
            The config, or the pair (config, {}) with `return_unused_kwargs`.
        """
        given = {key: value for key, value in (config_dict | kwargs).items() if not key.startswith("_")}
        settings = {_OURS.get(key, key): value for key, value in given.items() if key != "quant_method"}
        config = cls(**settings)
        config.is_ours |= "quant_type" in given
        return (config, {}) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """bitsandbytes' `quantization_config`, complete: its defaults differ from ours; or our own."""
        compute = self.bnb_4bit_compute_dtype or self._model_dtype or torch.float32
        if self.is_ours:
            values = {name: getattr(self, key) for name, key in _OURS.items()}
            return {"quant_method": METHOD, **values, "compute_dtype": _dtype_name(compute)}
        settings = {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            **_EIGHT_BIT,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": _dtype_name(compute),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": self.llm_int8_skip_modules,
        }
        # bitsandbytes has no such setting: each of its tensors says its own blocksize.
        return settings if self.blocksize == 64 else settings | {"blocksize": self.blocksize}

    def resolve(self, *, skip_modules: list[str], model_dtype: torch.dtype, experts: bool = False) -> Self:
        """Note what a loaded model turned out to be, so that `to_dict` describes it to other readers.

        Args:
            experts: those of a mixture are in 4 bits, which bitsandbytes has no layers for.
        """
        self.is_ours |= experts
        self.llm_int8_skip_modules, self._model_dtype = skip_modules, model_dtype
        return self


def prequantized_config(
    path: str | os.PathLike[str], *, compute_dtype: torch.dtype | str | None = None, **hub_kwargs: Any
) -> Any:
    """The config that makes `from_pretrained` load a bitsandbytes 4-bit folder into our layers, byte for byte.

        model = AutoModelForCausalLM.from_pretrained(folder, config=prequantized_config(folder))

    Args:
        path: folder or hub id of a model saved by halfbyte, or by transformers with bitsandbytes 4-bit.
        compute_dtype: overrides the stored one, as `HalfbyteConfig`'s `bnb_4bit_compute_dtype` ("auto": the
            input's dtype).
        hub_kwargs: passed to `AutoConfig.from_pretrained` (revision, token, ...).

    Returns:
        The model's own config (a `transformers.PreTrainedConfig`).

    Raises:
        ModelError: the model is not stored in bitsandbytes' 4-bit format or in ours.
    """
    config = AutoConfig.from_pretrained(path, **hub_kwargs)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        fix = "Pass quantization_config=HalfbyteConfig() to from_pretrained to quantize it"
        raise ModelError("is not quantized", where=str(path), fix=fix)
    if not is_four_bit(stored):
        what = f"is quantized as {stored.get('quant_method')}, not in bitsandbytes' 4 bits"
        raise ModelError(what, where=str(path), fix="Start from its 16-bit original")
    # Each tensor says for itself how it was quantized and stored; this is for layers' printing and for saving again.
    renamed = {_OURS.get(key, key): value for key, value in stored.items()}
    known = {key: value for key, value in renamed.items() if key in _KEYWORDS and key != "bnb_4bit_quant_storage"}
    settings = HalfbyteConfig.from_dict(stored if stored.get("quant_method") == METHOD else known).to_dict()
    dtype_key = next(key for key in ("bnb_4bit_compute_dtype", "compute_dtype") if key in settings)
    name = _dtype_name(compute_dtype) or settings[dtype_key]
    # A product in the model's stored dtype is what "auto" gives; "auto" also holds when it is loaded in another.
    settings[dtype_key] = None if name in ("auto", _dtype_name(config.dtype)) else name
    # transformers sends a dict that says load_in_4bit to bitsandbytes, whatever its quant_method.
    ours = {key: value for key, value in settings.items() if key not in ("load_in_4bit", "_load_in_4bit")}
    config.quantization_config = ours | {"quant_method": METHOD}
    return config


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _require_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices or (isinstance(value, int) and not isinstance(value, type(choices[0]))):
        raise ConfigError(f"{value!r} is not possible", where=key, why="choose one of " + ", ".join(map(str, choices)))


def _refuse_other(key: str, value: object) -> None:
    if key in _EIGHT_BIT:
        if value == _EIGHT_BIT[key]:
            return
        fix = f'Leave {key} out and give bnb_4bit_quant_type="int8", or use transformers.BitsAndBytesConfig'
        raise ConfigError(f"{value!r} asks for LLM.int8()", where=key, why="8 bits are another format here", fix=fix)
    near = difflib.get_close_matches(key, _KEYWORDS, n=1, cutoff=0.5)
    fix = f"Did you mean {near[0]}" if near else f"It has {', '.join(_KEYWORDS)}"
    raise ConfigError("HalfbyteConfig has no such setting", where=key, fix=fix)


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(HalfbyteConfig)
