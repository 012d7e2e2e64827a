"""``halfbyte import-config``: a config of another tool as TOML, with an account of every key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.common import AsJson, Debug, console, emit, write_config


def import_config(
    file: Annotated[Path, typer.Argument(help="Its YAML, JSON, Python script, or the arguments as typed.")],
    source: Annotated[
        str, typer.Option("--from", metavar="auto|axolotl|llamafactory|unsloth|trl", help="Whose config it is.")
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", help="The TOML file to write; default: standard output.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Turn a config of axolotl, LLaMA-Factory, Unsloth or TRL into TOML; say what differs or has no counterpart.

    Nothing is loaded or downloaded. Look at the result with: halfbyte plan --config FILE.
    """
    from halfbyte.elsewhere import SOURCES, translate
    from halfbyte.errors import ConfigError

    if source not in ("auto", *SOURCES):
        raise ConfigError(f"{source!r} is not known", where="--from", fix="Choose one of auto, " + ", ".join(SOURCES))
    result = translate(file, source)
    if output is not None:
        write_config(output, result.toml())
    out = console()
    counts = f"{len(result.mapped)} map, {len(result.differs)} differ, {len(result.unmapped)} have no counterpart"
    silent = f"; where it is silent, {len(result.defaults)} of {result.source}'s defaults" if result.defaults else ""
    out.print(f"{result.source}: of its keys {counts}{silent}", style="bold", markup=False)
    if result.hint:
        out.print(f"hint            {result.hint}", style="yellow", markup=False)
    for key, how in result.differs.items():
        out.print(f"differs         {key}: {how}", style="yellow", markup=False)
    for key, why in result.unmapped.items():
        out.print(f"no counterpart  {key}: {why}", style="dim", markup=False)
    emit(result.to_dict() | {"output": str(output) if output else None}, as_json, "" if output else result.toml())
