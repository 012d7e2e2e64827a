"""Names and sizes of number formats, without torch (the planner and `--help` need them)."""

from __future__ import annotations

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
