"""The names of the formats that a weight may be in, and the key by which a file says which one it is."""

from __future__ import annotations

from typing import Literal, get_args

QuantType = Literal["nf4", "fp4", "int4", "af4", "bof4", "bof4-s"]
QUANT_TYPES: tuple[str, ...] = get_args(QuantType)
BNB_TYPES = ("nf4", "fp4")
"""Those that bitsandbytes has; its kernels know tables by these names and ignore the stored ones."""


def state_key(quant_type: str) -> str:
    """The key of the JSON beside a weight: bitsandbytes' own, or one by which it finds no weight of its own."""
    return f"quant_state.{'bitsandbytes' if quant_type in BNB_TYPES else 'halfbyte'}__{quant_type}"


STATE_KEYS = tuple(map(state_key, QUANT_TYPES))
