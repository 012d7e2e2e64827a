"""Names and sizes of number formats, without torch (the planner and `--help` need them)."""

from __future__ import annotations

import re
from decimal import Decimal

ITEMSIZE: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes of one element, by torch's name without the ``torch.`` prefix."""

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
"""What a matrix product may run in."""

SAFETENSORS_DTYPES: dict[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""safetensors' dtype codes, as torch's names."""


def format_bytes(num_bytes: float) -> str:
    """`num_bytes` for people, in decimal units: 1536 -> '1.5 kB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


_UNITS = {"": 1, "b": 1} | {
    f"{letter}{tail}": base**power
    for base, tail in ((1000, "b"), (1024, "ib"))
    for power, letter in enumerate("kmgt", 1)
}  # fmt: skip


def parse_bytes(size: int | str) -> int:
    """Bytes of a size as people write it: 8000000000, "8GB" (1000**3 each), "512 MiB" (1024**2), "1.5e9".

    Raises:
        ValueError: it is not one.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d+)?)\s*([a-z]*)\s*", str(size).lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{size!r} is not a size: write bytes, or a number with kB, MB, GB, KiB, MiB, GiB")
    return int(Decimal(match[1]) * _UNITS[match[2]])
