"""Draw what is in benchmarks/results/: docs/speed.png.

usage: picture.py [RESULTS_DIR] [OUTPUT.png]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS = "#c8442b", "#8d99a6"
Panel = tuple[str, Callable[[Any, dict[str, Any]], None]]


def frame(axes: Any, title: str, unit: str) -> None:
    """What all panels share."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def bars(axes: Any, title: str, unit: str, figures: dict[str, float]) -> None:
    """Horizontal bars, ours in colour."""
    names = list(figures)[::-1]
    colours = [OURS if name.startswith("halfbyte") else OTHERS for name in names]
    drawn = axes.barh(names, [figures[name] for name in names], color=colours)
    axes.bar_label(drawn, fmt="%.0f" if max(figures.values()) > 20 else "%.2f", padding=3, fontsize=8)
    axes.margins(x=0.15)
    frame(axes, title, unit)


def step_speed(axes: Any, step: dict[str, Any]) -> None:
    """Tokens a second of a training step."""
    plain = {name: row["tokens_per_s"] for name, row in step["stacks"].items() if "checkpoint" not in name}
    bars(axes, f"LoRA step, {step['model']}, {step['batch']} x {step['tokens']} tokens", "tokens/s", plain)


def step_memory(axes: Any, step: dict[str, Any]) -> None:
    """What it holds at most."""
    plain = {name: row["peak_memory"] / 1e9 for name, row in step["stacks"].items() if "checkpoint" not in name}
    bars(axes, f"its peak memory, {step['model']}", "GB", plain)


def layer(axes: Any, linear: dict[str, Any]) -> None:
    """How many times longer the others take for a layer with its adapter, by rows of x."""
    for number, (shape, by_count) in enumerate(linear["seconds"]["default pages"].items()):
        names = [name for name in next(iter(by_count.values())) if name != "halfbyte"]
        for colour, name in enumerate(names):
            cases = {int(m): seconds[name] / seconds["halfbyte"] for m, seconds in by_count.items() if name in seconds}
            axes.plot(cases.keys(), cases.values(), ("-", "--", ":")[number % 3], color=f"C{colour}", marker="o",
                      markersize=3, label=f"{name}, {shape}")  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    frame(axes, "a layer with its adapter, float32: their time / ours", "tokens")


def codec(axes: Any, kernels: dict[str, Any]) -> None:
    """How many times longer the others take to quantize and to decode."""
    cases = kernels["figures"]["codec"]
    names = list(dict.fromkeys(name for case in cases for name in case["ratios"] if not name.startswith("halfbyte")))
    height = 0.8 / max(len(names), 1)
    for number, name in enumerate(names):
        places = [row - number * height for row, case in enumerate(cases) if name in case["ratios"]]
        values = [case["ratios"][name] for case in cases if name in case["ratios"]]
        drawn = axes.barh(places, values, height, color=f"C{number}", label=name)
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=7)
    axes.set_yticks(range(len(cases)), [case["case"].replace(", ", "\n") for case in cases])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.legend(fontsize=7)
    frame(axes, "the codec: their time / ours", "")


def tokens(axes: Any, generate: dict[str, Any]) -> None:
    """Tokens a second written."""
    figures = {name: row["tokens_per_s"] for name, row in generate["medians"].items()}
    bars(axes, f"generation, {generate['model']}, {generate['generate_threads']} thread(s)", "tokens/s", figures)


def disk(axes: Any, quantize: dict[str, Any]) -> None:
    """Seconds from disk to disk."""
    figures = {
        f"{stack}, {setting}": row["seconds"]
        for setting, stacks in quantize["figures"].items()
        for stack, row in stacks.items()
    }
    bars(axes, f"{quantize['bytes_in'] / 1e9:.1f} GB of bfloat16 to 4 bits, disk to disk", "seconds", figures)


def loading(axes: Any, load: dict[str, Any]) -> None:
    """Seconds to a model in memory."""
    figures = {f"{s}, {setting}": row["seconds"] for setting, stacks in load["loads"].items()
               for s, row in stacks.items()}  # fmt: skip
    bars(axes, "loading 2 GB of bfloat16 into 4 bits, and 4 bits", "seconds", figures)


PANELS: list[Panel] = [
    ("step-smollm2", step_speed), ("step-smollm2", step_memory), ("step-llama-1b", step_speed), ("linear", layer),
    ("kernels", codec), ("generate-smollm2-1", tokens), ("generate-llama-1b-1", tokens), ("quantize", disk),
    ("load", loading),
]  # fmt: skip
COLUMNS = 3


def main() -> None:
    """A panel for each benchmark that has run."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results")
    output = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent.parent / "docs" / "speed.png")
    panels = [(folder / f"{name}.json", draw) for name, draw in PANELS if (folder / f"{name}.json").exists()]
    rows = -(-len(panels) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(17, 4.2 * rows), layout="constrained", squeeze=False)
    for axes, (path, draw) in zip(grid.flat, panels, strict=False):
        draw(axes, json.loads(path.read_text(encoding="utf-8")))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(output, dpi=100)
    print(output)


if __name__ == "__main__":
    main()
