"""Which dtype matrix products run in: what the hardware does fast, and why."""

from __future__ import annotations

import torch


def choose_compute_dtype(setting: str, device: str = "cpu") -> tuple[torch.dtype, str]:
    """The dtype to compute in and the reason for it, as a sentence to print.

    A rule over the processor's features, not a timing: two runs on one machine must compute the same bytes.

    Args:
        setting: "auto", "float32", "bfloat16" or "float16" (``quant.compute_dtype``).
        device: "cpu", or "cuda", which is there.
    """
    fast = _has_bf16_units(device)
    if setting != "auto":
        if setting != "float32" and device == "cpu" and not fast:
            return getattr(torch, setting), f"as set; slow here: this CPU has no {setting} units, float32 is faster"
        return getattr(torch, setting), "as set in quant.compute_dtype"
    where = "GPU" if device == "cuda" else "CPU"
    if fast:
        return torch.bfloat16, f"this {where} multiplies bfloat16 natively, several times as fast as float32"
    return torch.float32, f"this {where} has no bfloat16 units, where bfloat16 products run 10 to 100 times slower"


def _has_bf16_units(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))  # what our kernels use; ARM's units are left idle
