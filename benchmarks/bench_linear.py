"""A linear layer with its adapter, forward and backward: beside bitsandbytes + PEFT, and dense weights.

    python benchmarks/bench_linear.py [--shapes 4096x4096,11008x4096] [--rows 1,16,64,256,1024,2048] [--rounds 7]

float32 compute for everyone, rank 16 on every layer, gradients to x, A and B. Contenders take turns within one
process, round after round; figures are medians, the caches are swept before each. The whole table is measured twice:
with the system's default page setting, and with huge pages for all of torch's memory (THP_MEM_ALLOC_ENABLE=1).
OpenBLAS (numpy's) does the two dense products and the adapter's six in a process of its own, because two BLAS
libraries in one process disturb each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import last_json, write_result

RANK = 16


def medians(contenders: dict[str, Callable[[], object]], rounds: int, sweep: Callable[[], object]) -> dict[str, float]:
    """Median seconds over `rounds`; the first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            sweep()
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def torch_stacks(rows: int, cols: int, counts: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a forward and backward of each torch stack, by number of rows of x."""
    import bitsandbytes
    import peft
    import torch
    from torch import nn

    from halfbyte.nn import Linear4bit
    from halfbyte.nn.lora_linear import fuse_lora_layers

    torch.manual_seed(0)
    weight = torch.randn(rows, cols) * 0.02
    theirs = bitsandbytes.nn.Linear4bit(
        cols, rows, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32
    )
    theirs.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    theirs = theirs.to("cpu")
    theirs.support_avx512bf16_for_cpu = False
    dense = nn.Linear(cols, rows, bias=False)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    stacks: dict[str, nn.Module] = {}
    bases = {"halfbyte": Linear4bit.from_weight(weight), "bitsandbytes + PEFT": theirs, "torch dense + PEFT": dense}
    for name, base in bases.items():
        holder = nn.Sequential(base)
        adapted = peft.get_peft_model(holder, peft.LoraConfig(r=RANK, target_modules=["0"]))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.02)
        if name == "halfbyte":
            assert fuse_lora_layers(adapted) == 1
        stacks[name] = adapted.get_base_model().train()
    broom = torch.zeros(16 << 20)
    results = {}
    for count in counts:
        x, grad = torch.randn(count, cols, requires_grad=True), torch.randn(count, rows)

        def step(layer: nn.Module, x: torch.Tensor = x, grad: torch.Tensor = grad) -> None:
            layer(x).backward(grad)
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None

        contenders = {name: (lambda layer=layer: step(layer)) for name, layer in stacks.items()}
        results[str(count)] = medians(contenders, rounds, lambda: broom.add_(1))
    return results


def openblas(rows: int, cols: int, counts: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """The same products on a dense float32 weight in numpy."""
    import numpy as np

    draw = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return draw.standard_normal(shape, dtype=np.float32)

    weight, a, b, broom = normal(rows, cols), normal(RANK, cols), normal(rows, RANK), np.zeros(16 << 20, np.float32)
    results = {}
    for count in counts:
        x, grad = normal(count, cols), normal(count, rows)

        def step(x: Any = x, grad: Any = grad) -> None:
            u = x @ a.T
            y = x @ weight.T
            y += u @ b.T
            v = grad @ b
            dx = grad @ weight
            dx += v @ a
            v.T @ x, grad.T @ u  # the adapter's gradients

        results[str(count)] = medians({"OpenBLAS dense": step}, rounds, lambda: broom.__iadd__(1))
    return results


def child(options: argparse.Namespace, what: str, **environment: str) -> dict[str, Any]:
    """This script again, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", what, "--shapes", options.shapes]
    command += ["--rows", options.rows, "--rounds", str(options.rounds)]
    return last_json(command, env=os.environ | environment)


def limits() -> dict[str, float]:
    """The machine's own, in this run."""
    from halfbyte.kernels.machine import peak_gflops, read_gbytes_per_s

    return {"peak_gflops": peak_gflops(), "read_gbytes_per_s": read_gbytes_per_s()}


def print_tables(figures: dict[str, dict[str, dict[str, dict[str, float]]]], peak: float) -> None:
    """One table a page setting: ours in milliseconds, and how many times longer the others take."""
    from rich.console import Console
    from rich.table import Table

    for setting in ("default pages", "huge pages"):
        names = ["bitsandbytes + PEFT", "torch dense + PEFT", "OpenBLAS dense"]
        table = Table("layer", "rows", "halfbyte ms", "GFLOP/s", "of the peak", *(f"{n} / ours" for n in names),
                      title=f"linear + adapter, forward + backward, float32, {setting}")  # fmt: skip
        for shape, by_count in figures[setting].items():
            rows, cols = map(int, shape.split("x"))
            for count, seconds in by_count.items():
                seconds = seconds | figures["OpenBLAS"][shape][count]
                ours = seconds["halfbyte"]
                rate = (4 * rows * cols + 6 * RANK * (rows + cols)) * int(count) / ours / 1e9
                ratios = [f"{seconds[name] / ours:.2f}" for name in names]
                table.add_row(shape, count, f"{ours * 1e3:.2f}", f"{rate:.0f}", f"{rate / peak:.0%}", *ratios)
        Console(width=130).print(table)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="out x in features")
    parser.add_argument("--rows", default="1,16,64,256,1024,2048")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", choices=("torch", "openblas", "limits"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "limits":
        print(json.dumps(limits()))
        return
    if options.child:
        measure = {"torch": torch_stacks, "openblas": openblas}[options.child]
        counts = [int(count) for count in options.rows.split(",")]
        shapes = {shape: tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")}
        print(json.dumps({shape: measure(*size, counts, options.rounds) for shape, size in shapes.items()}))
        return
    machine = child(options, "limits")
    figures = {
        "default pages": child(options, "torch"),
        "huge pages": child(options, "torch", THP_MEM_ALLOC_ENABLE="1"),
        "OpenBLAS": child(options, "openblas"),
    }
    print_tables(figures, machine["peak_gflops"])
    write_result(Path(__file__).parent / "results" / "linear.json", {"limits": machine, "seconds": figures})


if __name__ == "__main__":
    main()
