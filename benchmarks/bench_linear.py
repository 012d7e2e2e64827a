"""A linear layer with its adapter, forward and backward: beside other NF4 layers with PEFT, and dense weights.

    python benchmarks/bench_linear.py [--shapes 4096x4096,11008x4096] [--rows 1,16,64,256,1024,2048] [--rounds 5]

float32 compute for everyone, rank 16, gradients to x, A and B. Every contender has a process of its own (contender.py)
and they take turns; the caches are swept before each run, which
follows one that is not timed; figures are medians. The whole table is measured twice: with
the system's default page setting, and with huge pages for all of torch's memory (THP_MEM_ALLOC_ENABLE=1). OpenBLAS
(numpy's) does the two dense products and the adapter's six. bitsandbytes' CPU fork and torchao take part where
`benchmarks/peers.py` has made their environment, with default pages only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import write_result
from rich.console import Console
from rich.table import Table
from turns import Field

from halfbyte.kernels.machine import peak_gflops, read_gbytes_per_s

RANK = 16
NAMES = ["halfbyte", "bitsandbytes", "torch dense", "OpenBLAS dense", "bitsandbytes-cpu-fork", "torchao NF4"]
PAGES = {"default pages": NAMES, "huge pages": NAMES[:3]}
Figures = dict[str, dict[str, dict[str, float]]]


def measure(names: list[str], options: argparse.Namespace, **environment: str) -> tuple[Figures, dict[str, str]]:
    """Seconds by shape, rows of x and contender; who could not run, and why."""
    figures: Figures = {}
    with Field(names, options.work, environment) as field:
        for shape in options.shapes.split(","):
            rows, cols = map(int, shape.split("x"))
            figures[shape] = {
                count: field.medians(options.rounds, task="layer", rows=rows, cols=cols, m=int(count))
                for count in options.rows.split(",")
            }
    return figures, field.cannot


def print_table(setting: str, figures: Figures, peak: float) -> None:
    """Ours in milliseconds, and how many times longer the others take."""
    first = next(iter(next(iter(figures.values())).values()))
    names = [name for name in first if name != "halfbyte"]
    table = Table("layer", "rows", "halfbyte ms", "GFLOP/s", "of the peak", *(f"{name} / ours" for name in names),
                  title=f"linear + adapter, forward + backward, float32, {setting}")  # fmt: skip
    for shape, by_count in figures.items():
        rows, cols = map(int, shape.split("x"))
        for count, seconds in by_count.items():
            ours = seconds["halfbyte"]
            rate = (4 * rows * cols + 6 * RANK * (rows + cols)) * int(count) / ours / 1e9
            ratios = [f"{seconds[name] / ours:.2f}" if name in seconds else "" for name in names]
            table.add_row(shape, count, f"{ours * 1e3:.2f}", f"{rate:.0f}", f"{rate / peak:.0%}", *ratios)
    Console(width=130).print(table)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="out x in features")
    parser.add_argument("--rows", default="1,16,64,256,1024,2048")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stacks", default=",".join(NAMES))
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linear.json")
    options = parser.parse_args()
    machine = {"peak_gflops": peak_gflops(), "read_gbytes_per_s": read_gbytes_per_s()}
    figures, cannot = {}, {}
    for setting, names in PAGES.items():
        environment = {"THP_MEM_ALLOC_ENABLE": "1"} if setting == "huge pages" else {}
        names = [name for name in names if name in options.stacks.split(",")]
        figures[setting], missing = measure(names, options, **environment)
        cannot |= missing
        print_table(setting, figures[setting], machine["peak_gflops"])
    for what, why in cannot.items():
        print(f"{what}: {why}")
    write_result(options.output, {
        "limits": machine, "rounds": options.rounds, "seconds": figures, "cannot": cannot,
    })  # fmt: skip


if __name__ == "__main__":
    main()
