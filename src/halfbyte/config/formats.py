"""The names of the formats that a weight may be in, and the key by which a file says which one it is."""

from __future__ import annotations

from typing import Literal, get_args

QuantType = Literal["nf4", "fp4", "int4", "int4-asym", "af4", "bof4", "bof4-s", "int8", "nf3", "nf2"]
QUANT_TYPES: tuple[str, ...] = get_args(QuantType)
BNB_TYPES = ("nf4", "fp4")
"""Those that bitsandbytes has; its kernels know tables by these names and ignore the stored ones."""

NOT_FOUR = {"int8": 8, "nf3": 3, "nf2": 2}
"""Bits of those that have more or fewer than four."""


def bits_of(quant_type: str) -> int:
    """Bits of a code."""
    return NOT_FOUR.get(quant_type, 4)


def constants_of(quant_type: str) -> int:
    """Numbers of a block beside its codes: a scale, and of int4-asym an offset after it."""
    return 2 if quant_type == "int4-asym" else 1


def state_key(quant_type: str) -> str:
    """The key of the JSON beside a weight: bitsandbytes' own, or one by which it finds no weight of its own."""
    return f"quant_state.{'bitsandbytes' if quant_type in BNB_TYPES else 'halfbyte'}__{quant_type}"


STATE_KEYS = tuple(map(state_key, QUANT_TYPES))
