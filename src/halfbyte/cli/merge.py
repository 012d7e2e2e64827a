"""``halfbyte merge``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.common import AsJson, Config, Debug, Memory, Model, Set, console, emit, load_run

if TYPE_CHECKING:
    from rich.table import Table

    from halfbyte.merge.feedback import Survived

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="DIR[=WEIGHT]", help="An adapter folder, and how much of it; repeatable."),
]
Output = Annotated[Path | None, typer.Option("--output", help="Folder to write; must not be there yet.")]
Format = Annotated[
    str,
    typer.Option(
        "--format", metavar="16bit|4bit|gguf|gguf-lora|adapter", help="What to write; 4bit: in the base's own format."
    ),
]
Base = Annotated[
    str, typer.Option("--base", metavar="quantized|original|auto", help="Weights the update is added to.")
]
Original = Annotated[
    str, typer.Option("--original", metavar="MODEL", help="The 16-bit weights, where MODEL holds quantized ones.")
]
GgufType = Annotated[str, typer.Option("--gguf-type", metavar="F16|Q8_0|Q4_0|...", help="Of --format gguf.")]
Way = Annotated[
    str,
    typer.Option(
        "--combine", metavar="cat|svd|linear|ties_svd|...",
        help="Of --format adapter: cat is the exact sum, svd the nearest of --rank; docs/merge.md has the others.",
    ),
]  # fmt: skip
Rank = Annotated[int, typer.Option("--rank", min=0, help="Of --combine svd; default: the largest of the adapters'.")]
Density = Annotated[float, typer.Option("--density", help="Share of the values that ties and dare keep.")]
AnyTemplate = Annotated[
    bool, typer.Option("--any-template", help="Merge adapters of another chat template than MODEL's all the same.")
]
Data = Annotated[
    Path | None, typer.Option("--data", help="Samples to measure drift on; default: what the adapter's run used.")
]
MaxDrift = Annotated[
    float | None,
    typer.Option(
        "--max-drift", metavar="NATS", min=0.0,
        help="Most KL a token from base + adapter, else exit 5. Default: 0.01 in 16 and 8 bits, 0.2 in fewer, 4bit.",
    ),
]  # fmt: skip


WORST = 5
"""Layers that are shown to people."""


def merge(
    model: Model = None,
    adapter: Adapters = None,
    output: Output = None,
    format: Format = "16bit",
    base: Base = "quantized",
    original: Original = "",
    gguf_type: GgufType = "F16",
    combine: Way = "cat",
    rank: Rank = 0,
    density: Density = 0.2,
    any_template: AnyTemplate = False,
    data: Data = None,
    max_drift: MaxDrift = None,
    memory: Memory = None,
    config: Config = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write base and adapters as one model, or several adapters as one; measure how far it is from what was trained.

    Works tensor by tensor; nothing gets the output's name before it is whole and has been measured.
    """
    from halfbyte.dtypes import format_bytes
    from halfbyte.errors import ConfigError

    run = load_run(config, settings, {
        "--model": ("model.path", model), "--memory": ("memory.budget", memory), "--data": ("data.eval", data),
    })  # fmt: skip
    for value, option in ((run.model.path, "--model"), (adapter, "--adapter"), (output, "--output")):
        if not value:
            raise ConfigError("is not set", where=option, fix=f"Give {option}")
    assert output is not None
    from halfbyte.cli.progress import LoadBar
    from halfbyte.merge import merge as run_merge

    out = console()
    with LoadBar(out) as bar:
        result = run_merge(
            run, weights_of(adapter or ()), output, format=format, base=base, original=original,
            gguf_type=gguf_type, combine=combine, rank=rank, density=density, any_template=any_template,
            max_drift=max_drift, on_progress=bar.update,
            say=lambda text: out.print(text, style="dim", markup=False),
        )  # fmt: skip
    rows = "".join(f" and {count} rows of {name}" for name, count in result.rows.items())
    text = (
        f"{result.layers} layers{rows} merged onto the {result.base} base, {format_bytes(result.bytes_out)} as "
        f"{result.form}, in {result.seconds:.1f} s, peak memory {format_bytes(result.peak_memory)}\n{result.output}\n"
        f"drift from base + adapter, in float32, on {result.drift.on}: {result.drift}"
    )
    if result.survived:
        out.print(survival(result.survived))
    emit(result.to_dict(), as_json, text)


def weights_of(given: Sequence[str]) -> dict[str, float]:
    """How much of which folder, of "DIR" or "DIR=0.7" each."""
    from halfbyte.errors import ConfigError

    weights: dict[str, float] = {}
    for text in given:
        folder, equals, number = text.rpartition("=")
        if not equals or Path(text).is_dir():
            folder, number = text, "1"
        if folder in weights:
            raise ConfigError(f"{folder} is given twice", where="--adapter", fix="Give it once, with one weight")
        try:
            weights[folder] = float(number)
        except ValueError:
            raise ConfigError(f"{number!r} is not a weight", where="--adapter", fix=f"Give {folder}=0.5") from None
    return weights


def survival(layers: Sequence[Survived]) -> Table:
    """What became of the update of the layers that have the largest errors."""
    from rich.table import Table

    title = f"the {min(WORST, len(layers))} layers of {len(layers)} with the largest errors; all: halfbyte.json"
    table = Table(
        "layer", "kept in weights", "in outputs", "error", box=None, title=title, title_justify="left",
        padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for layer in sorted(layers, key=lambda layer: -layer.error)[:WORST]:
        table.add_row(layer.name, f"{layer.weights:.1%}", f"{layer.outputs:.1%}", f"{layer.error:.1%}")
    return table
