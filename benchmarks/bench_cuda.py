"""The GPU's proof and figures: is every operator right, then how fast beside bitsandbytes.

    scripts/bench --device cuda [--shapes 4096x4096,14336x4096] [--rows 1,8,64,256,2048] [--skip-step]

First the tests that need a GPU; nothing is timed unless they pass. Then halfbyte's Triton kernels, bitsandbytes' and
cuBLAS on a dense bfloat16 weight, in turn, the second-level cache swept before each; medians of device time (replays
of a graph) and of the host's time to launch one. Then a LoRA step of a Llama with the shape of Llama-3.2-1B and random
weights. The JSON in benchmarks/results/ is what decides which kernels `kernels.cuda_ops` prefers, and the thresholds
in `kernels/triton/tiles.py`: please send it in.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
TESTS = ("kernels/triton_cases.py", "kernels/test_gpu.py", "optim/test_paged.py", "store")
ROUNDS = 30

Contenders = dict[str, Callable[[], object]]


def correct() -> bool:
    """Run the tests that need a GPU."""
    tests = [str(HERE.parent / "tests" / name) for name in TESTS]
    return subprocess.run([sys.executable, "-m", "pytest", "-x", *tests], cwd=HERE.parent).returncode == 0


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` as a graph: its replay costs the GPU's time and next to none of the host's."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, times tiles, fills the allocator
            run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def interleaved(contenders: Contenders) -> dict[str, dict[str, float]]:
    """Medians for each contender: seconds of device time, and of host time for putting it in the GPU's queue."""
    broom = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    graphs = {name: captured(run) for name, run in contenders.items()}
    device: dict[str, list[float]] = {name: [] for name in contenders}
    host: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            broom.zero_()
            start.record()
            graphs[name].replay()
            stop.record()
            stop.synchronize()
            device[name].append(start.elapsed_time(stop) / 1e3)
            started = time.perf_counter()
            run()
            host[name].append(time.perf_counter() - started)
            torch.cuda.synchronize()
    return {
        name: {"device_s": statistics.median(device[name]), "host_s": statistics.median(host[name])}
        for name in contenders
    }


def kernels(rows: int, cols: int, counts: list[int]) -> list[dict[str, Any]]:
    """Decode, forward and backward of one double-quantized weight in bfloat16."""
    from halfbyte.kernels import bnb_cuda
    from halfbyte.kernels.triton import kernels as ours
    from halfbyte.quant import quantize

    weight = quantize(torch.randn(rows, cols, device="cuda")).op_args
    dense = ours.dequantize(weight, (rows, cols), torch.bfloat16)
    sources: dict[str, Any] = {"triton": ours}
    if bnb_cuda.find() is None:
        sources["bitsandbytes"] = bnb_cuda

    def row(what: str, m: int, call: Callable[[Any], object], plain: Contenders) -> dict[str, Any]:
        contenders: Contenders = {name: (lambda s=source: call(s)) for name, source in sources.items()}
        return {"what": what, "out": rows, "in": cols, "rows": m, "seconds": interleaved({**contenders, **plain})}

    def decode() -> torch.Tensor:
        return ours.dequantize(weight, (rows, cols), torch.bfloat16)

    table = [row("dequantize", 0, lambda s: s.dequantize(weight, (rows, cols), torch.bfloat16), {})]
    for m in counts:
        x = torch.randn(m, cols, device="cuda", dtype=torch.bfloat16)
        grad = torch.randn(m, rows, device="cuda", dtype=torch.bfloat16)
        forward: Contenders = {"decode, product": lambda x=x: x @ decode().T, "dense": lambda x=x: x @ dense.T}
        backward: Contenders = {"decode, product": lambda g=grad: g @ decode(), "dense": lambda g=grad: g @ dense}
        table.append(row("forward", m, lambda s, x=x: s.linear(x, weight, None, rows), forward))
        table.append(row("dx", m, lambda s, g=grad: s.linear_dx(g, weight, cols), backward))
    return table


def steps(work: Path, batch: int, tokens: int) -> dict[str, Any]:
    """A LoRA step of each stack, in turn."""
    from common import last_json, llama_1b_folder

    folder, script = str(llama_1b_folder(work / "llama-1b")), str(HERE / "cuda_step.py")
    figures = {}
    for name, stack, kernel in (
        ("halfbyte, triton", "halfbyte", "triton"), ("halfbyte, bitsandbytes", "halfbyte", "bitsandbytes"),
        ("bitsandbytes", "bitsandbytes", ""),
    ):  # fmt: skip
        command = [sys.executable, "-W", "ignore", script, stack, folder, str(batch), str(tokens), "10"]
        try:
            figures[name] = last_json(command, env={**os.environ, "HALFBYTE_CUDA_KERNELS": kernel})
        except subprocess.CalledProcessError as error:
            figures[name] = {"failed": error.returncode}
    return figures


def show(table: list[dict[str, Any]], figures: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    names = list(table[-1]["seconds"])
    printed = Table("weight", "what", "rows", *names, title="microseconds of the GPU, and of the host")
    for row in table:
        figures_of = [row["seconds"].get(name) for name in names]
        times = [f"{f['device_s'] * 1e6:.1f} {f['host_s'] * 1e6:.0f}" if f else "" for f in figures_of]
        printed.add_row(f"{row['out']}x{row['in']}", row["what"], str(row["rows"] or ""), *times)
    console.print(printed)
    printed = Table("LoRA step", "tokens/s", "peak memory", "first and last loss")
    for name, row in figures.items():
        if "failed" in row:
            printed.add_row(name, "failed", "", "")
        else:
            printed.add_row(
                name, f"{row['tokens_per_s']:.0f}", f"{row['peak_memory'] / 1e9:.2f} GB",
                f"{row['losses'][0]:.4f} {row['losses'][-1]:.4f}",
            )  # fmt: skip
    if figures:
        console.print(printed)


def main() -> int:
    """Prove, measure, print, store. 4: no CUDA device; 1: an operator is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336", help="out x in features")
    parser.add_argument("--rows", default="1,4,8,16,32,64,128,256,512,2048", help="rows of x, comma separated")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--skip-step", action="store_true", help="kernels only")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cuda.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_cuda: no CUDA device (or a torch without CUDA); nothing was run", file=sys.stderr)
        return 4
    if not correct():
        print("bench_cuda: an operator is wrong on this GPU; nothing was timed", file=sys.stderr)
        return 1
    from common import write_result

    torch.manual_seed(0)
    table = []
    for shape in options.shapes.split(","):
        rows, cols = map(int, shape.split("x"))
        table += kernels(rows, cols, [int(count) for count in options.rows.split(",")])
    figures = {} if options.skip_step else steps(options.work, options.batch, options.tokens)
    show(table, figures, Console(width=120))
    gpu = torch.cuda.get_device_name()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    peers = {name: importlib.metadata.version(name) for name in ("triton", "bitsandbytes") if find_spec(name)}
    write_result(
        options.output,
        {"gpu": gpu, "capability": capability, "peers": peers, "kernels": table, "step": figures},
    )
    print(f"written to {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
