"""``halfbyte runs``: the training runs of this user."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.common import AsJson, Debug, emit, runs_file

if TYPE_CHECKING:
    from halfbyte.report.runs import Kept

runs_app = typer.Typer(help="The training runs of this user: list, show, compare.", invoke_without_command=True)

Named = Annotated[str, typer.Argument(metavar="RUN", help="A run's number, or its output folder.")]


@runs_app.callback()
def runs(
    context: typer.Context,
    most: Annotated[int, typer.Option("--most", min=1, help="How many, the newest first.")] = 20,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the training runs of this user, the newest first."""
    if context.invoked_subcommand is not None:
        return
    found = _all()[:most]
    if as_json:
        emit({"runs": [run.to_dict() for run in found]}, as_json)
        return
    if not found:
        print("no runs yet")
        return
    _print(found)


@runs_app.command()
def show(run: Named, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show one run: figures, its error, settings that are not the defaults, its report."""
    from halfbyte.config import RunConfig, to_dict
    from halfbyte.report.html import legible
    from halfbyte.report.runs_page import HEAD, differences, row_of

    kept = _one(run)
    report = Path(kept.output) / "report.html"
    if as_json:
        emit({**kept.to_dict(), "config": kept.config, "curves": kept.curves}, as_json)
        return
    rows = dict(zip(HEAD, row_of(kept), strict=True)) | {"error": kept.error, "output": kept.output}
    if kept.state == "finished" and report.exists():
        rows["report"] = str(report)
    for name, value in rows.items():
        if value:
            print(f"{name + ':':<15} {legible(value)}")
    plain = to_dict(RunConfig())
    print("settings that are not the defaults:")
    for name, (value, default) in differences([kept, _with_config(kept, plain)]).items():
        print(f"  {name}: {_value(value)}" + (f"   (default {_value(default)})" if default is not None else ""))


@runs_app.command()
def compare(
    named: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Two runs or more.")],
    page: Annotated[Path | None, typer.Option("--page", help="Also as a page with curves, in this file.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare runs: losses, memory, speed, and the settings that differ."""
    from halfbyte.checkpoint.durable import write_file
    from halfbyte.config.target import check_parent
    from halfbyte.errors import ConfigError
    from halfbyte.report.runs_page import differences, runs_page

    if len(named) < 2:
        raise ConfigError("one run alone cannot be compared", where="runs compare", fix="Name two or more")
    found = [_one(name) for name in named]
    changed = differences(found)
    if page is not None:
        check_parent(page)
        write_file(page, runs_page(found).encode())
    if as_json:
        rows = [run.to_dict() for run in found]
        emit({"runs": rows, "differences": changed, "page": str(page) if page else None}, as_json)
        return
    _side_by_side(found, changed)
    if page is not None:
        print(f"page     {page}")


def _all() -> list[Kept]:
    from halfbyte.errors import ResourceError
    from halfbyte.report.runs import Runs, StoreError

    path = runs_file()
    try:
        return Runs(path).all()
    except StoreError as problem:
        raise ResourceError(
            "cannot be read", where=str(path), why=str(problem).removeprefix(f"{path}: "),
            fix="Move the file away to begin a new one",
        ) from None  # fmt: skip


def _one(name: str) -> Kept:
    from halfbyte.errors import ConfigError

    runs = _all()
    number = int(name) if name.isdecimal() else None
    found = [run for run in runs if run.id == number or run.output == str(Path(name).absolute())]
    if not found:
        raise ConfigError("no such run", where=name, fix="See: halfbyte runs")
    return found[0]


def _with_config(run: Kept, config: dict[str, dict[str, Any]]) -> Kept:
    from dataclasses import replace

    return replace(run, config=config)


def _print(found: list[Kept]) -> None:
    """A row each, in 80 columns: a long model's name is cut."""
    from rich.table import Table
    from rich.text import Text

    from halfbyte.report.html import legible
    from halfbyte.report.runs_page import SHORT_HEAD, short_row_of

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in SHORT_HEAD:
        table.add_column(name, no_wrap=name != "model")
    for run in found:
        cells = [Text(legible(cell), no_wrap=True, overflow="ellipsis") for cell in short_row_of(run)]
        cells[1].stylize({"finished": "green", "running": "cyan"}.get(run.state, "yellow"))
        table.add_row(*cells)
    _out(table)
    for run in found:
        if run.error:
            _out(Text(f"{run.id}: {legible(run.error)}", "yellow"))


def _side_by_side(found: list[Kept], changed: dict[str, list[Any]]) -> None:
    """A column each, under its number: figures, then the settings that differ."""
    from rich.table import Table
    from rich.text import Text

    from halfbyte.report.html import legible
    from halfbyte.report.runs_page import HEAD, row_of

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("run", *(str(run.id) for run in found)):
        table.add_column(name, overflow="fold")
    rows = list(zip(HEAD, *map(row_of, found), strict=True))[1:]
    rows += [("error", *(run.error for run in found))] if any(run.error for run in found) else []
    rows += [(name, *map(_value, values)) for name, values in changed.items()]
    for row in rows:
        table.add_row(*(Text(legible(cell)) for cell in row))
    _out(table)


def _out(shown: Any) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(shown)


def _value(value: Any) -> str:
    return '""' if value == "" else str(value)
