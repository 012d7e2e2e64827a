"""``halfbyte data``: what a file becomes, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.common import AsJson, Config, Debug, Model, Set, emit, load_run

if TYPE_CHECKING:
    from rich.text import Text

    from halfbyte.data import Example, TokenizedData

data_app = typer.Typer(help="See what a data file becomes before training on it.")

Data = Annotated[str | None, typer.Option("--data", help="JSON lines; default: data.train of the config.")]


@data_app.command()
def preview(
    model: Model = None,
    data: Data = None,
    config: Config = None,
    settings: Set = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="How many samples.")] = 3,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the first samples token by token, and which tokens are learned."""
    tokenizer, tokenized = _load(model, data, config, settings)
    shown = range(min(samples, len(tokenized)))
    if as_json:
        rows = [_sample_json(tokenizer, tokenized[i], int(tokenized.lines[i])) for i in shown]
        emit({"format": tokenized.report.format, "samples": rows}, as_json)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    legend = Text.assemble("format ", tokenized.report.format, "   ", ("⟦learned⟧", "bold green"), "   not learned   ")
    console.print(legend + Text.assemble(("special token", "magenta"), "   | between tokens   ⏎ newline   ⇥ tab"))
    for i in shown:
        example = tokenized[i]
        targets = int((example.labels >= 0).sum())
        title = f"line {tokenized.lines[i]}: {len(example.input_ids)} tokens, {targets} learned"
        console.print(Text("\n" + title, "bold"), _marked(tokenizer, example), sep="\n")
    for note in tokenized.report.notes:
        console.print(Text(f"note: {note}", "yellow"))


@data_app.command()
def check(
    model: Model = None,
    data: Data = None,
    config: Config = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Count records, tokens and what is learned; say what is dropped, and why."""
    _, tokenized = _load(model, data, config, settings)
    report = tokenized.report
    if as_json:
        emit(report.to_dict(), as_json)
        return
    rows = [
        ("file", report.path),
        ("format", report.format),
        ("records read", f"{report.read:,}"),
        ("samples kept", f"{report.kept:,}"),
        *(("dropped", f"{count:,}  {reason}") for reason, count in report.dropped.items()),
        ("tokens", f"{report.tokens:,}  (longest sample {report.longest:,})"),
        ("learned tokens", f"{report.supervised_tokens:,}  ({report.supervised_share:.1%})"),
        *(("note", note) for note in report.notes),
    ]
    for name, value in rows:
        print(f"{name:<15} {value}")


def _load(
    model: str | None, data: str | None, config: Path | None, settings: list[str] | None
) -> tuple[Any, TokenizedData]:
    """(tokenizer, tokenized data) as a run with these options would have them."""
    from halfbyte.errors import ConfigError

    run = load_run(config, settings, {"--model": ("model.path", model), "--data": ("data.train", data)})
    if not run.model.path:
        raise ConfigError("no model is given", where="--model", fix="Name a folder, a .gguf file or a hub id")
    if not run.data.train:
        raise ConfigError("no data file is given", where="--data", fix="Name a .jsonl file")
    from halfbyte.data import load_data
    from halfbyte.model import load_tokenizer
    from halfbyte.model.tokens import choose_tokens

    tokenizer = load_tokenizer(run.model.path)
    choose_tokens(tokenizer, run.lora.trainable_tokens)
    return tokenizer, load_data(run.data.train, tokenizer, run.data)


def _sample_json(tokenizer: Any, example: Example, line: int) -> dict[str, Any]:
    from halfbyte.data import token_text

    targets = (example.labels >= 0).tolist()
    tokens = [token_text(tokenizer, token) for token in example.input_ids.tolist()]
    return {"line": line, "num_tokens": len(tokens), "num_targets": sum(targets), "tokens": tokens, "targets": targets}


def _marked(tokenizer: Any, example: Example) -> Text:
    """The sample with a bar between tokens and brackets around what is learned: legible without colour, too."""
    from rich.text import Text

    from halfbyte.data import tokens_of

    text, inside, at_line_start = Text(), False, True
    for token in tokens_of(tokenizer, example):
        if inside and not token.learned:
            text.append("⟧", "bold green")
        if not at_line_start:
            text.append("|", "dim")
        if token.learned and not inside:
            text.append("⟦", "bold green")
        style = "bold green" if token.learned else "dim"
        text.append(token.text, "magenta" + (" bold" if token.learned else "") if token.special else style)
        inside, at_line_start = token.learned, token.text.endswith("\n")
    return text.append("⟧", "bold green") if inside else text
