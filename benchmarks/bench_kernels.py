"""How fast are the 4-bit kernels: against bitsandbytes and against torch on a dense float32 weight.

    python benchmarks/bench_kernels.py [--shapes 4096x4096,11008x4096] [--rows 1,16,128,512] [--json out.json]

All contenders run in one process, in turn, round after round, so that a noisy neighbour hits them alike; the caches
are swept before each, because in training every layer finds its weight cold. Figures are medians, and the ratios are
what to compare between machines. float32 compute: the best case of the others on CPUs
without native bfloat16. `dense` holds the decoded weight in memory (8 times the bytes) and only multiplies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import halfbyte.kernels
from halfbyte.kernels.cpu import WeightView
from halfbyte.kernels.registry import cpu_choice
from halfbyte.quant.absmax import compress_absmax

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

Contenders = dict[str, Callable[[], object]]


def interleaved(contenders: Contenders, rounds: int) -> dict[str, float]:
    """Median seconds of each contender over `rounds`, the first round thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    broom = torch.zeros(16 << 20)  # 64 MB: twice a large last-level cache's share
    for number in range(rounds + 1):
        for name, run in contenders.items():
            broom += 1
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def codec(weight: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Quantize, and decode to a fresh tensor and into a given one, with double quantization in the decoding."""
    codes, absmax = torch.ops.halfbyte.quantize_4bit(weight, "nf4", 64)
    scales = compress_absmax(absmax)
    shape = list(weight.shape)
    quantize: Contenders = {"halfbyte": lambda: torch.ops.halfbyte.quantize_4bit(weight, "nf4", 64)}
    decode: Contenders = {
        "halfbyte": lambda: torch.ops.halfbyte.dequantize_4bit(codes, *scales, "nf4", 64, shape, torch.float32)
    }
    library, out = cpu_choice().library, torch.empty(shape)
    into: Contenders = {}
    if library is not None:
        view = WeightView(codes, *scales, "nf4", 64, (shape[0], shape[1]))
        into["halfbyte"] = lambda: view.dequantize_into(library, out)
    if bnb is not None:
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        into["bitsandbytes"] = lambda: bnb.functional.dequantize_4bit(packed, state, out=out)
        quantize["bitsandbytes"] = lambda: bnb.functional.quantize_4bit(weight, quant_type="nf4")
        decode["bitsandbytes"] = lambda: bnb.functional.dequantize_4bit(packed, state)
    figures = {"quantize": interleaved(quantize, min(rounds, 3)), "dequantize": interleaved(decode, rounds)}
    return figures | ({"dequantize into a buffer": interleaved(into, rounds)} if library is not None else {})


def products(weight: Tensor, m: int, isas: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Forward, and forward with backward to x, of `m` rows; double quantization."""
    rows, cols = weight.shape
    codes, absmax = torch.ops.halfbyte.quantize_4bit(weight, "nf4", 64)
    packed = (codes, *compress_absmax(absmax), "nf4", 64)
    dense = torch.ops.halfbyte.dequantize_4bit(*packed, [rows, cols], torch.float32)
    x, grad = torch.randn(m, cols), torch.randn(m, rows)
    library = cpu_choice().library

    def ours(isa: str, backward: bool) -> Callable[[], object]:
        def run() -> None:
            if library is not None:
                library.force(isa)
            torch.ops.halfbyte.linear_4bit(x, *packed, rows, None)
            if backward:
                torch.ops.halfbyte.linear_4bit_dx(grad, *packed, cols)

        return run

    forward: Contenders = {f"halfbyte {isa}": ours(isa, backward=False) for isa in isas}
    both: Contenders = {f"halfbyte {isa}": ours(isa, backward=True) for isa in isas}
    forward["dense"] = lambda: x @ dense.t()
    both["dense"] = lambda: (x @ dense.t(), grad @ dense)
    if bnb is not None:
        their, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        state.dtype = torch.float32

        def theirs(backward: bool) -> Callable[[], object]:
            def run() -> None:
                leaf = x.detach().requires_grad_(backward)
                y = bnb.matmul_4bit(leaf, their.t(), quant_state=state)
                if backward:
                    y.backward(grad)

            return run

        forward["bitsandbytes"], both["bitsandbytes"] = theirs(backward=False), theirs(backward=True)
    return {"forward": interleaved(forward, rounds), "forward+backward": interleaved(both, rounds)}


def peak_gflops(rounds: int = 5) -> float:
    """What torch's own float32 product reaches here: says how busy the machine is."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / interleaved({"mm": lambda: a @ b}, rounds)["mm"] / 1e9


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, so that a figure can be placed later."""
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_mm_gflops": round(peak_gflops(), 1),
        "torch": torch.__version__,
        "bitsandbytes": getattr(bnb, "__version__", None),
        "commit": commit.stdout.strip(),
        "kernels": [vars(row) for row in halfbyte.kernels.kernel_report()],
    }


def print_table(title: str, results: list[dict[str, Any]], base: str, console: Console) -> None:
    """One line a case: milliseconds of `base`, and how many times longer each other one takes."""
    names = [name for name in results[0]["seconds"] if name != base]
    table = Table("case", f"{base} ms", *(f"{name} / ours" for name in names), title=title)
    for result in results:
        ours = result["seconds"][base]
        ratios = [f"{result['seconds'][name] / ours:.2f}" for name in names]
        table.add_row(result["case"], f"{ours * 1e3:.2f}", *ratios)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096", help="out x in features, comma separated")
    parser.add_argument("--rows", default="1,4,16,64,128,512", help="rows of x, comma separated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    library = cpu_choice().library
    isas = [isa for isa in reversed(library.supported()) if isa != "baseline"] if library is not None else []
    base = isas[0] if isas else "reference"
    figures: dict[str, list[dict[str, Any]]] = {}
    for shape in options.shapes.split(","):
        rows, cols = (int(size) for size in shape.split("x"))
        weight = torch.randn(rows, cols) * 0.02
        if library is not None and isas:
            library.force(base)
        for what, seconds in codec(weight, options.rounds).items():
            figures.setdefault("codec", []).append({"case": f"{what} {shape}", "seconds": seconds})
        for m in (int(count) for count in options.rows.split(",")):
            for what, seconds in products(weight, m, isas or [base], options.rounds).items():
                figures.setdefault(what, []).append({"case": f"{shape}, {m} rows", "seconds": seconds})
    if library is not None and isas:
        library.force(base)
    console = Console(width=120)
    place = environment()
    console.print(
        f"{place['cpu']}, {place['threads']} threads; torch's float32 product: {place['torch_mm_gflops']} GFLOP/s"
    )
    for title, results in figures.items():
        print_table(title, results, "halfbyte" if title == "codec" else f"halfbyte {base}", console)
    if options.json is not None:
        options.json.write_text(json.dumps({"environment": place, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
