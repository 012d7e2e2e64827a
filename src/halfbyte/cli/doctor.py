"""``halfbyte doctor``: what this machine does with each operator, why, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from halfbyte.cli.common import AsJson, Debug, emit

OUT, IN, ROWS = 2048, 2048, 256
REPEATS = 7


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Kernels in use and why, threads, measured speeds, memory, versions of what matters."""
    import psutil
    import torch
    from rich.console import Console
    from rich.table import Table

    from halfbyte.checkpoint import versions
    from halfbyte.dtypes import format_bytes
    from halfbyte.kernels import kernel_report
    from halfbyte.model import choose_compute_dtype

    dtype, reason = choose_compute_dtype("auto")
    rows = kernel_report()
    memory = psutil.virtual_memory()
    speeds = _measure()
    result: dict[str, Any] = {
        "kernels": [vars(row) for row in rows],
        "compute_dtype": str(dtype).removeprefix("torch."),
        "compute_dtype_reason": reason,
        "threads": torch.get_num_threads(),
        "speeds": speeds,
        "memory": {"total": memory.total, "available": memory.available},
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {**versions(), "bitsandbytes": _version("bitsandbytes"), "trl": _version("trl")},
    }
    if as_json:
        emit(result, as_json)
        return
    out = Console(highlight=False, soft_wrap=True)
    table = Table("operator", "device", "kernel", "why", box=None, header_style="bold")
    for row in rows:
        table.add_row(row.op, row.device, row.kernel, row.reason)
    out.print(table)
    out.print(f"\ncompute dtype  {result['compute_dtype']}: {reason}", markup=False)
    out.print(f"threads        {result['threads']}")
    out.print(f"memory         {format_bytes(memory.available)} free of {format_bytes(memory.total)}")
    out.print(f"GPU            {result['cuda'] or 'none; halfbyte has not been run on a GPU yet'}")
    speed_table = Table("measured", "speed", box=None, header_style="bold")
    for name, value in speeds.items():
        speed_table.add_row(name, f"{value:,.2f}" if value < 10 else f"{value:,.0f}")
    out.print("\n", speed_table)
    out.print("\n" + ", ".join(f"{name} {version}" for name, version in result["versions"].items()), style="dim")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _measure() -> dict[str, float]:
    """Medians of interleaved repeats, a second or two in all."""
    import torch

    from halfbyte.quant import quantize

    weight, x = torch.randn(OUT, IN), torch.randn(ROWS, IN)
    quantized, buffer = quantize(weight), torch.empty(32 * 2**20, dtype=torch.uint8)
    half, half_x = weight.bfloat16(), x.bfloat16()
    flop = 2 * ROWS * OUT * IN / 1e9
    work: dict[str, tuple[Callable[[], object], float]] = {
        "torch dense float32, GFLOP/s": (lambda: x @ weight.T, flop),
        "torch dense bfloat16, GFLOP/s": (lambda: half_x @ half.T, flop),
        "4-bit product float32, GFLOP/s": (
            lambda: torch.ops.halfbyte.linear_4bit(x, *quantized.op_args, OUT, None), flop),
        "4-bit product bfloat16, GFLOP/s": (
            lambda: torch.ops.halfbyte.linear_4bit(half_x, *quantized.op_args, OUT, None), flop),
        "quantize, G weights/s": (lambda: quantize(weight), OUT * IN / 1e9),
        "dequantize, G weights/s": (lambda: quantized.dequantize(torch.float32), OUT * IN / 1e9),
        "memory read, GB/s": (lambda: buffer.view(torch.int64).sum(), buffer.nbytes / 1e9),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(REPEATS + 1):
        for name, (run, _) in work.items():
            started = time.perf_counter()
            run()
            if repeat:  # the first one loads libraries and touches memory
                times[name].append(time.perf_counter() - started)
    return {name: amount / statistics.median(times[name]) for name, (_, amount) in work.items()}
