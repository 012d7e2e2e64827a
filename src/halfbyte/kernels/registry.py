"""Which kernel serves which operator, and why.

The native library is loaded at the first use of an operator on the CPU. Where it is missing or broken, or the
environment says so, the plain-torch reference serves; the reason is kept for `halfbyte doctor`.

``HALFBYTE_ISA`` = baseline, avx2, avx512, avx512_bf16, neon or reference overrides the choice (tests run every path on
a machine); ``HALFBYTE_CUDA_KERNELS`` = triton, bitsandbytes or reference does so on a GPU. ``HALFBYTE_PANEL_ROWS``
takes the place of what `crossover` measures, which is kept in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ConfigError
from halfbyte.kernels import bnb_cuda, cpu
from halfbyte.kernels.abi import DTYPES, ISAS, OK

ISA_VARIABLE = "HALFBYTE_ISA"
CUDA_VARIABLE = "HALFBYTE_CUDA_KERNELS"
PANEL_ROWS_VARIABLE = "HALFBYTE_PANEL_ROWS"
LEAST_PANEL_ROWS = 64
"""With fewer rows tiles always serve."""
PANEL_DTYPES = ("float32", "bfloat16")
CUDA_KERNELS = ("triton", "bitsandbytes", "reference")
OPS = ("quantize_4bit", "dequantize_4bit", "linear_4bit", "linear_4bit_dx")
LAYER_OPS = (
    "lora_linear_4bit", "linear_frozen", "softmax_cross_entropy_", "packed_attention", "rms_norm", "rope_", "gated",
    "adamw_32bit_", "adamw_8bit_", "quantize_8bit", "least_error_scales", "codes_for_scales",
)  # fmt: skip
"""What a training step and double quantization need besides."""


@dataclass(frozen=True)
class KernelRow:
    """One line of `halfbyte doctor`: `kernel` serves `op` on `device`, because of `reason`."""

    op: str
    device: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class CpuChoice:
    """The library that serves the CPU (None: the reference does) and why."""

    library: cpu.Library | None
    reason: str


@cache
def cpu_choice() -> CpuChoice:
    """Load the native library once. Only a wrong ``HALFBYTE_ISA`` raises; everything else falls back."""
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted not in ("", "reference", *ISAS):
        names = ", ".join((*ISAS, "reference"))
        raise ConfigError(f"unknown instruction set {wanted!r}", where=ISA_VARIABLE, fix=f"Choose one of {names}")
    if wanted == "reference":
        return CpuChoice(None, f"{ISA_VARIABLE}=reference")
    path = cpu.find_library()
    if path is None:
        return CpuChoice(
            None, "the native library was not built at install time: no C++ compiler, or its build failed"
        )
    try:
        library = cpu.Library(path)
    except (OSError, AttributeError, ValueError) as error:
        return CpuChoice(None, f"the native library cannot be used: {error}")
    if not wanted:
        return CpuChoice(library, f"the best of {', '.join(library.supported())} on this CPU")
    if not library.force(wanted):
        raise ConfigError(
            f"this CPU or build has no {wanted}",
            where=ISA_VARIABLE,
            fix=f"Choose one of {', '.join((*library.supported(), 'reference'))}",
        )
    return CpuChoice(library, f"{ISA_VARIABLE}={wanted}")


def run_native(name: str, *arguments: Any) -> bool:
    """Call the library's function `name` with `arguments` and the number of threads; False where it does not serve."""
    library = cpu_choice().library
    return library is not None and getattr(library.call, name)(*arguments, torch.get_num_threads()) == OK


def panel_rows_setting() -> dict[str, int | None] | None:
    """``HALFBYTE_PANEL_ROWS``: "never", or such as "bfloat16=256": panels from so many rows on. None: not set."""
    text = os.environ.get(PANEL_ROWS_VARIABLE, "")
    if not text:
        return None
    rows: dict[str, int | None] = dict.fromkeys(PANEL_DTYPES)
    for part in text.split(",") if text != "never" else ():
        name, _, number = part.partition("=")
        if name not in PANEL_DTYPES or not number.isdecimal() or int(number) < LEAST_PANEL_ROWS:
            raise ConfigError(
                f"cannot read {part!r}",
                where=PANEL_ROWS_VARIABLE,
                fix=f"Give never, or rows by dtype, at least {LEAST_PANEL_ROWS}: bfloat16=256",
            )
        rows[name] = int(number)
    return rows


def cache_folder() -> Path:
    """halfbyte's folder for what can be made again; it need not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "halfbyte"


@dataclass(frozen=True)
class CudaChoice:
    """Whose kernels serve CUDA tensors, the first that knows a case first (none of them: the reference), and why."""

    kernels: tuple[str, ...]
    reason: str


@cache
def cuda_choice() -> CudaChoice:
    """Look once. Only a wrong or unmet ``HALFBYTE_CUDA_KERNELS`` raises; everything else falls back."""
    wanted = os.environ.get(CUDA_VARIABLE, "")
    if wanted not in ("", *CUDA_KERNELS):
        raise ConfigError(
            f"unknown kernels {wanted!r}", where=CUDA_VARIABLE, fix=f"Choose one of {', '.join(CUDA_KERNELS)}"
        )
    if wanted == "reference":
        return CudaChoice((), f"{CUDA_VARIABLE}=reference")
    missing = _missing_cuda_kernels(wanted)
    if wanted and wanted in missing:
        raise ConfigError(f"{wanted} cannot serve", where=CUDA_VARIABLE, why=missing[wanted])
    if wanted:
        return CudaChoice((wanted,), f"{CUDA_VARIABLE}={wanted}")
    if not missing:
        return CudaChoice(("triton", "bitsandbytes"), "the faster one on an H100 (docs/gpu.md)")
    found = tuple(name for name in ("triton", "bitsandbytes") if name not in missing)
    return CudaChoice(found, "; ".join(f"no {name}: {why}" for name, why in missing.items()))


def _missing_cuda_kernels(wanted: str) -> dict[str, str]:
    """Why bitsandbytes or Triton cannot serve; only the `wanted` one is looked at, when one is."""
    missing = {}
    if wanted != "bitsandbytes" and importlib.util.find_spec("triton") is None:
        missing["triton"] = "it is not installed (pip install triton)"
    if wanted != "triton":
        if importlib.util.find_spec("bitsandbytes") is None:
            missing["bitsandbytes"] = "it is not installed"
        elif (why := bnb_cuda.find()) is not None:
            missing["bitsandbytes"] = why
    return missing


def count_nonfinite(tensor: Tensor) -> int:
    """NaN and Inf in a floating tensor; one pass over it, without a temporary where the library serves."""
    choice = cpu_choice() if tensor.device.type == "cpu" and tensor.dtype in DTYPES else None
    if choice is not None and choice.library is not None:
        return choice.library.count_nonfinite(tensor)
    return int(tensor.numel() - torch.isfinite(tensor).sum().item())


def release_workspace() -> None:
    """Give the few megabytes that the CPU kernels keep between calls back to the system."""
    if (library := cpu_choice().library) is not None:
        library.release_workspace()


def kernel_report() -> list[KernelRow]:
    """What serves each operator on each device of this machine."""
    choice = cpu_choice()
    rows = []
    for op in (*OPS, *LAYER_OPS):
        if choice.library is None:
            kernel, reason = "torch reference", choice.reason
        elif op in LAYER_OPS and not choice.library.fused_linear and not op.startswith(("adamw", "quantize")):
            kernel, reason = "torch reference", f"{choice.reason}; it has no vectors"
        elif op.startswith("linear_4bit") and not choice.library.fused_linear:
            kernel = f"{choice.library.isa} decode in panels + torch matmul"
            reason = f"{choice.reason}; it has no fused matrix product"
        elif op.startswith("linear_4bit"):
            kernel, reason = f"{choice.library.isa} fused", choice.reason
        else:
            kernel, reason = choice.library.isa, choice.reason
        if choice.library is not None and not choice.library.openmp:
            reason += "; built without OpenMP: one thread"
        rows.append(KernelRow(op, "cpu", kernel, reason))
    return rows + (_cuda_rows() if torch.cuda.is_available() else [])


def _cuda_rows() -> list[KernelRow]:
    choice = cuda_choice()
    rows = []
    for op in OPS:
        kernels, reason = choice.kernels, choice.reason
        if op == "quantize_4bit" and "bitsandbytes" in kernels:
            kernels = tuple(name for name in kernels if name != "bitsandbytes")
            reason = "bitsandbytes gives blocks of zeros other codes than the format has"
        kernel = kernels[0] if kernels else "torch reference"
        if op == "linear_4bit" and len(kernels) > 1:
            kernel = "triton, bitsandbytes for one or two rows"
        if kernel == "bitsandbytes" and op == "linear_4bit_dx":
            kernel = "bitsandbytes decode + torch matmul"
        rows.append(KernelRow(op, "cuda", kernel, reason))
    decode = f"{choice.kernels[0]} decode" if choice.kernels else "torch reference decode"
    rows.append(KernelRow("lora_linear_4bit", "cuda", f"{decode} + torch matmul", choice.reason))
    flash = "for 16-bit heads of up to 256, on Ampere and newer; the torch reference for others"
    rows.append(KernelRow("packed_attention", "cuda", "torch FlashAttention", flash))
    rows += [
        KernelRow(op, "cuda", "triton" if "triton" in choice.kernels else "torch reference", choice.reason)
        for op in ("softmax_cross_entropy_", "rms_norm", "rope_", "gated", "adamw_32bit_", "adamw_8bit_")
    ]
    return rows
