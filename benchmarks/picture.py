"""Draw what is in benchmarks/results/: docs/speed.png.

usage: picture.py [RESULTS_DIR] [OUTPUT.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS = "#c8442b", "#8d99a6"


def load(folder: Path, name: str) -> dict[str, Any] | None:
    """A benchmark's figures, None where it has not run."""
    path = folder / f"{name}.json"
    result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return result


def bars(axes: Any, title: str, unit: str, figures: dict[str, float]) -> None:
    """Horizontal bars, ours in colour."""
    names = list(figures)[::-1]
    colours = [OURS if name.startswith("halfbyte") else OTHERS for name in names]
    drawn = axes.barh(names, [figures[name] for name in names], color=colours)
    axes.bar_label(drawn, fmt="%.0f" if max(figures.values()) > 20 else "%.2f", padding=3, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def ratios(axes: Any, linear: dict[str, Any]) -> None:
    """How many times longer the others take for a layer with its adapter, by rows of x."""
    for shape, by_count in linear["seconds"]["default pages"].items():
        for name, style in (("bitsandbytes + PEFT", "-"), ("torch dense + PEFT", "--")):
            counts = [int(count) for count in by_count]
            times = [seconds[name] / seconds["halfbyte"] for seconds in by_count.values()]
            axes.plot(counts, times, style, marker="o", markersize=3, label=f"{name}, {shape}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title("a layer with its adapter: their time / ours", fontsize=10, loc="left")
    axes.set_xlabel("tokens", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """One row of panels for what there is."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results")
    output = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent.parent / "docs" / "speed.png")
    step, linear = load(folder, "step-smollm2"), load(folder, "linear")
    figure, panels = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    if step is not None:
        stacks = {name: row for name, row in step["stacks"].items() if "checkpoint" not in name}
        bars(panels[0], "LoRA step, SmolLM2-135M, 2 x 512 tokens", "tokens/s",
             {name: row["tokens_per_s"] for name, row in stacks.items()})  # fmt: skip
        bars(panels[1], "its peak memory", "GB", {name: row["peak_memory"] / 1e9 for name, row in stacks.items()})
    if linear is not None:
        ratios(panels[2], linear)
    figure.savefig(output, dpi=110)
    print(output)


if __name__ == "__main__":
    main()
