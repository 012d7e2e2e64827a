"""``halfbyte doctor``: what this machine does with each operator, why, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.cli.common import AsJson, Debug, calibration_file, emit, known_machine

if TYPE_CHECKING:
    from halfbyte.kernels.registry import KernelRow

OUT, IN, ROWS = 2048, 2048, 256
REPEATS = 7
LIMIT_FLOPS = "limit: float32 multiply-adds in registers, GFLOP/s"
LIMIT_BYTES = "limit: memory read, GB/s"
SLOW_BF16 = 0.5
"""Of float32's speed: below it bfloat16 is warned of."""


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Kernels in use and why, threads, measured speeds, memory, versions of what matters."""
    import psutil
    import torch
    from rich.console import Console

    from halfbyte.checkpoint import versions
    from halfbyte.dtypes import format_bytes
    from halfbyte.kernels import kernel_report, panel_rule
    from halfbyte.model import choose_compute_dtype

    dtype, reason = choose_compute_dtype("auto")
    rows = kernel_report()
    rule = panel_rule()
    memory = psutil.virtual_memory()
    speeds = _measure() | _measure_steps()
    result: dict[str, Any] = {
        "kernels": [vars(row) for row in rows],
        "compute_dtype": str(dtype).removeprefix("torch."),
        "compute_dtype_reason": reason,
        "panel_rows": rule.rows,
        "panel_rows_reasons": rule.reasons,
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
    _print_kernels(rows)
    out.print(f"compute dtype  {result['compute_dtype']}: {reason}", markup=False)
    for name, why in rule.reasons.items():
        out.print(f"{name:<14} {why}", markup=False)
    out.print(f"threads        {result['threads']}")
    out.print(f"memory         {format_bytes(memory.available)} free of {format_bytes(memory.total)}")
    out.print(f"GPU            {result['cuda'] or 'no CUDA device'}")
    out.print("\n", _speed_table(speeds))
    if speeds["torch dense bfloat16, GFLOP/s"] < SLOW_BF16 * speeds["torch dense float32, GFLOP/s"]:
        out.print("warning: bfloat16 is slow on this CPU; leave quant.compute_dtype at auto", style="yellow")
    out.print("\n" + ", ".join(f"{name} {version}" for name, version in result["versions"].items()), style="dim")


def _print_kernels(rows: Sequence[KernelRow]) -> None:
    """The operators by the kernel that serves them, and why it does, in lines of the terminal's width."""
    from rich.console import Console
    from rich.padding import Padding

    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.device, row.reason), []).append(row.op)
    out = Console(highlight=False)
    for (kernel, device, reason), ops in groups.items():
        out.print(f"[bold]{kernel}[/] on {device}: {reason}")
        out.print(Padding(", ".join(ops), (0, 0, 1, 2), expand=False))


def _measure_steps() -> dict[str, float]:
    """Of a whole training step, left for `halfbyte plan` where no training run has left its own."""
    from halfbyte.dtypes import COMPUTE_DTYPES
    from halfbyte.kernels import panel_rule
    from halfbyte.plan import write_calibration
    from halfbyte.train.calibration import step_gflops

    machine = known_machine()
    found = step_gflops(machine, COMPUTE_DTYPES[:2])
    write_calibration(calibration_file(), gflops=found | machine.gflops, panel_rows=panel_rule().rows)
    return {f"training step {dtype}, GFLOP/s": value for dtype, value in found.items()}


def _speed_table(speeds: dict[str, float]) -> Any:
    """Every speed, and its share of the machine's limit in the same unit."""
    from rich.table import Table

    table = Table("measured", "speed", "of the limit", box=None, header_style="bold")
    for name, value in speeds.items():
        limit = speeds[LIMIT_FLOPS] if "float32, GFLOP" in name else speeds[LIMIT_BYTES] if "GB/s" in name else 0.0
        share = f"{value / limit:.0%}" if limit and not name.startswith("limit") else ""
        table.add_row(name, f"{value:,.2f}" if value < 10 else f"{value:,.0f}", share)
    return table


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _measure() -> dict[str, float]:
    """Medians of interleaved repeats, a second or two in all."""
    import torch

    from halfbyte.kernels.machine import peak_gflops, read_gbytes_per_s
    from halfbyte.quant import quantize

    weight, x = torch.randn(OUT, IN), torch.randn(ROWS, IN)
    quantized, large = quantize(weight), quantize(torch.randn(16 * OUT, IN))  # 35 MB: not in the cache
    half, half_x, row = weight.bfloat16(), x.bfloat16(), x[:1]
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
        "4-bit product of one row, GB/s of codes": (
            lambda: torch.ops.halfbyte.linear_4bit(row, *large.op_args, large.shape[0], None), large.nbytes / 1e9),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(REPEATS + 1):
        for name, (run, _) in work.items():
            started = time.perf_counter()
            run()
            if repeat:  # the first one loads libraries and touches memory
                times[name].append(time.perf_counter() - started)
    limits = {LIMIT_FLOPS: peak_gflops(), LIMIT_BYTES: read_gbytes_per_s()}
    return limits | {name: amount / statistics.median(times[name]) for name, (_, amount) in work.items()}
