"""How fast are the 4-bit kernels, beside other NF4 kernels and torch on a dense float32 weight.

    python benchmarks/bench_kernels.py [--shapes 4096x4096] [--rows 1,16,64,256,1024] [--rounds 7] [--output FILE]

Codec (quantize, decode to fresh memory, decode into a given buffer) and products (forward, forward and backward to x).
Every contender has a process of its own (contender.py) and they take turns; the caches are swept before each run.
Figures are medians, and the ratios are what to compare between machines. float32 compute: the best case of the others
on CPUs without native bfloat16. `torch dense` holds the decoded weight, 8 times the bytes. bitsandbytes' CPU fork and
torchao take part where `benchmarks/peers.py` has made their environment.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import write_result
from rich.console import Console
from rich.table import Table
from turns import Field

NAMES = ["halfbyte", "halfbyte avx2", "bitsandbytes", "bitsandbytes-cpu-fork", "torchao NF4", "torch dense"]
CODEC = ("quantize", "dequantize", "dequantize into a buffer")
PRODUCTS = ("forward", "forward+backward")


def against(seconds: dict[str, float], fresh: dict[str, float] | None = None) -> dict[str, float]:
    """Their times over ours; `fresh` stands in for who cannot do the task itself."""
    others = {**(fresh or {}), **seconds}
    return {name: others[name] / seconds["halfbyte"] for name in others if name != "halfbyte"}


def print_table(title: str, results: list[dict[str, Any]], console: Console) -> None:
    """One line a case: our milliseconds, and how many times longer each other one takes."""
    names = list(dict.fromkeys(name for result in results for name in result["ratios"]))
    table = Table("case", "halfbyte ms", *(f"{name} / ours" for name in names), title=title)
    for result in results:
        ratios = [f"{result['ratios'][name]:.2f}" if name in result["ratios"] else "" for name in names]
        table.add_row(result["case"], f"{result['seconds']['halfbyte'] * 1e3:.2f}", *ratios)
    console.print(table)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096", help="out x in features, comma separated")
    parser.add_argument("--rows", default="1,16,64,256,1024", help="rows of x, comma separated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stacks", default=",".join(NAMES))
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args()
    figures: dict[str, list[dict[str, Any]]] = {"codec": [], **{task: [] for task in PRODUCTS}}
    with Field(options.stacks.split(","), options.work) as field:
        for shape in options.shapes.split(","):
            rows, cols = map(int, shape.split("x"))
            fresh: dict[str, float] = {}
            for task in CODEC:
                seconds = field.medians(options.rounds, task=task, rows=rows, cols=cols, m=1)
                instead = fresh if task == "dequantize into a buffer" else None
                fresh = seconds
                figures["codec"].append({"case": f"{task}, {shape}", "seconds": seconds,
                                         "ratios": against(seconds, instead)})  # fmt: skip
            for m in map(int, options.rows.split(",")):
                for task in PRODUCTS:
                    seconds = field.medians(options.rounds, task=task, rows=rows, cols=cols, m=m)
                    figures[task].append(
                        {"case": f"{shape}, {m} rows", "seconds": seconds, "ratios": against(seconds)}
                    )
        cannot = field.cannot
    console = Console(width=130)
    for title, results in figures.items():
        print_table(title, results, console)
    for what, why in cannot.items():
        console.print(f"{what}: {why}")
    note = "who takes no buffer is compared by its time into fresh memory"
    write_result(options.output, {"rounds": options.rounds, "figures": figures, "cannot": cannot, "note": note})


if __name__ == "__main__":
    main()
