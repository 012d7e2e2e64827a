"""The sections that say what is trained: the base, how it is quantized, the adapters. schema.py has the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from halfbyte.config.checks import require, require_choice
from halfbyte.config.formats import QUANT_TYPES, QuantType, bits_of, constants_of
from halfbyte.dtypes import COMPUTE_DTYPES

Device = Literal["auto", "cpu", "cuda"]
Scale = Literal["auto", "absmax", "mse", "mse-signed"]
Init = Literal["random", "cloq", "pissa", "loftq"]
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """[model]: the base model."""

    path: str = ""
    """A local folder (safetensors, in 16 bits or quantized), a .gguf file, or a hub id."""
    device: Device = "auto"
    """Where it computes: cpu, cuda, or auto, which is cuda where torch sees such a device."""

    def __post_init__(self) -> None:
        require_choice("model.device", self.device, get_args(Device))


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """[quant]: how the base is held, in 4 bits or in 8, 3 or 2."""

    quant_type: QuantType = "nf4"
    """nf4 (the paper's), fp4; our own: int4, int4-asym, af4, bof4, bof4-s, int8, nf3, nf2 (docs/formats.md)."""
    bits: float = 0.0
    """`halfbyte quantize`: bits a weight on average, spread over layers as calibrate's text measures, or by error."""
    blocksize: int = 64
    """Weights that share one scale: 32 to 4096, a power of two."""
    double_quant: bool = True
    """Quantize the scales themselves to 8 bits: 0.127 instead of 0.5 bits for each weight."""
    scale: Scale = "auto"
    """mse-signed (least error, of either sign: auto, but of int8), mse, or absmax (bitsandbytes' own bytes)."""
    calibrate: str = ""
    """`halfbyte quantize`: samples whose text decides scales and codes; generic: Python's own; empty: none does."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of matrix products; auto: what this hardware does fast, said with its reason (calibrating: from 1B on)."""
    skip_modules: tuple[str, ...] = ()
    """Linear layers to leave unquantized, by full name or last part (the output head always is)."""
    embeddings: Literal["as_stored", "int8"] = "as_stored"
    """Input embeddings and output head in memory: as_stored (16 bits), or int8 with a scale for 64 weights."""

    def __post_init__(self) -> None:
        require_choice("quant.quant_type", self.quant_type, QUANT_TYPES)
        require(self.bits == 0 or 2 <= self.bits <= 9, "quant.bits", self.bits, "0, or from 2 to 9")
        require_choice("quant.blocksize", self.blocksize, BLOCKSIZES)
        require_choice("quant.scale", self.scale, get_args(Scale))
        require_choice("quant.compute_dtype", self.compute_dtype, ("auto", *COMPUTE_DTYPES))
        require_choice("quant.embeddings", self.embeddings, ("as_stored", "int8"))

    @property
    def chosen_scale(self) -> str:
        """`scale`, auto decided."""
        if self.scale != "auto":
            return self.scale
        return "absmax" if bits_of(self.quant_type) == 8 and not self.calibrate else "mse-signed"

    @property
    def whole_weights(self) -> bool:
        """Whether a weight is quantized only when it is whole in memory: codes for scales that depend on all others.

        Scales of either sign are double-quantized by 256, but int8's, where a mean to subtract matters still; codes
        for the largest magnitude do not wait for how it is decoded.
        """
        centred = self.chosen_scale == "mse" or (self.chosen_scale == "mse-signed" and self.quant_type == "int8")
        return self.double_quant and (centred or constants_of(self.quant_type) > 1)

    @property
    def recipe(self) -> dict[str, Any]:
        """What the bytes of a 4-bit weight depend on, as it is recorded; the scale where it is not absmax."""
        more = {} if self.chosen_scale == "absmax" else {"scale": self.chosen_scale}
        return {"quant_type": self.quant_type, "double_quant": self.double_quant, "blocksize": self.blocksize, **more}

    def with_recipe(self, recipe: Mapping[str, Any]) -> QuantConfig:
        """These settings with the recorded `recipe`."""
        known = {key: recipe[key] for key in ("quant_type", "double_quant", "blocksize") if key in recipe}
        return replace(self, **known, scale=recipe.get("scale", "absmax"), calibrate="", bits=0.0)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """[lora]: the adapters."""

    r: int = 16
    """Rank of A (r, in) and B (out, r). The paper uses 64 and finds no effect of r when all layers have one."""
    lora_alpha: float = 32.0
    """The update is scaled by lora_alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapter's input (the paper: 0.1 up to 13B, 0.05 above; small runs do better without)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """all-linear (every quantized layer: not the head, not quant.skip_modules), or names, in full or last parts."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead, so that a large r helps."""
    use_dora: bool = False
    """DoRA: train the length of each row of W + BA apart from its direction."""
    trainable_tokens: tuple[str, ...] = ()
    """Tokens whose rows in embeddings and head are trained; those that the tokenizer has not are added to it."""
    modules_to_save: tuple[str, ...] = ()
    """Trained whole, in float32, and saved with the adapter: the input embedding and the output head, by name."""
    init: Init = "random"
    """random (A uniform, B zero); cloq, pissa, loftq: as `halfbyte quantize` with it left a start."""
    loftq_rounds: int = 1
    """`halfbyte quantize` with init = "loftq": times the error is decomposed; 1: the base as it is without."""
    match_steps: int = 120
    """`halfbyte quantize` with init = "cloq": steps towards the 16-bit model's predictions; 0: none."""

    def __post_init__(self) -> None:
        require(self.r >= 1, "lora.r", self.r, "the rank is at least 1")
        require(
            0 < self.lora_alpha < math.inf, "lora.lora_alpha", self.lora_alpha, "an alpha of 0 or less trains nothing"
        )
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a probability, at least 0 and below 1")
        require_choice("lora.init", self.init, get_args(Init))
        require(self.loftq_rounds >= 1, "lora.loftq_rounds", self.loftq_rounds, "at least 1")
        require(self.match_steps >= 0, "lora.match_steps", self.match_steps, "0 or more")
        for key, names in (("trainable_tokens", self.trainable_tokens), ("modules_to_save", self.modules_to_save)):
            require(all(map(str.strip, names)), f"lora.{key}", names, "one of them is empty")
            require(len({*names}) == len(names), f"lora.{key}", names, "one of them stands there twice")
        require(len(self.target_modules) > 0, "lora.target_modules", self.target_modules, "name at least one layer")

    @property
    def scaling(self) -> float:
        """The factor on B @ A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
