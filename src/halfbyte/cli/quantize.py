"""``halfbyte quantize``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.common import AsJson, Config, Debug, Memory, Model, Set, console, emit, load_run, with_base_of

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.config import RunConfig
    from halfbyte.model.quantize import QuantizeResult


def quantize(
    model: Model = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder to write.")] = None,
    quant_type: Annotated[
        str | None,
        typer.Option(
            "--quant-type",
            metavar="TYPE",
            help="In 4 bits nf4, fp4, int4, int4-asym, af4, bof4, bof4-s; in 8, 3 and 2 int8, nf3, nf2. Default: nf4.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="PAGE.html", help="Error by layer, as a page and as JSON beside it."),
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="With --report: perplexity before and after on these samples.")
    ] = None,
    config: Config = None,
    memory: Memory = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a model quantized, in 4 bits or as --quant-type says; halfbyte loads the folder.

    With nf4 or fp4 transformers with bitsandbytes loads it, too.

    Reads tensor by tensor, large ones slice by slice: memory holds one tensor at a time. With quant.calibrate
    scales and codes are chosen on a text, layer by layer; lora.init adds an adapter to begin at.
    """
    from halfbyte.dtypes import format_bytes
    from halfbyte.errors import ConfigError

    flags = {
        "--model": ("model.path", model), "--quant-type": ("quant.quant_type", quant_type),
        "--memory": ("memory.budget", memory), "--eval-data": ("data.eval", eval_data),
    }  # fmt: skip
    run = with_base_of(load_run(config, settings, flags), None)
    if output is None:
        raise ConfigError("is not set", where="--output", fix="Give a folder to write")
    _check_report(report, eval_data, run.lora.init)
    out = console()
    result = _write(run, output, out)
    text = (
        f"{format_bytes(result.bytes_in)} -> {format_bytes(result.bytes_out)}, {result.quantized} layers at "
        f"{result.bits_per_weight:.3f} bits per weight{_formats(result.formats)}, in {result.seconds:.1f} s, "
        f"peak memory {format_bytes(result.peak_memory)}\n{result.output}"
    )
    found = result.to_dict()
    if report is not None:
        out.print(f"report: reading both models{', and evaluating them' if run.data.eval else ''}", markup=False)
        found["report"], line = _report(run, output, report)
        text += f"\n{line}\n{report}"
    emit(found, as_json, text)


def _write(run: RunConfig, output: Path, out: Console) -> QuantizeResult:
    """As the settings say: on a text, with a start, or by the nearest codes."""
    from halfbyte.calibrate import calibrate_model, quantize_with_start
    from halfbyte.cli.progress import LoadBar
    from halfbyte.model.quantize import quantize_model, scale_text
    from halfbyte.train.match import match_start

    with LoadBar(out) as bar:
        if run.quant.calibrate:
            return calibrate_model(run, output, match=match_start, say=out.print, on_progress=bar.update)
        if run.lora.init != "random":
            result: QuantizeResult = quantize_with_start(run, output, on_progress=bar.update)
        else:
            result = quantize_model(run.model.path, output, run.quant, on_progress=bar.update)
    out.print(scale_text(run.quant), markup=False)
    return result


def _formats(formats: dict[str, str]) -> str:
    """How many layers are in each."""
    counts = Counter(formats.values())
    most = ": nothing is left to raise" if counts.keys() == {"int8"} else ""
    return f" ({', '.join(f'{count} in {name}' for name, count in counts.most_common())}{most})" if counts else ""


def _check_report(report: Path | None, eval_data: Path | None, init: str) -> None:
    """Before minutes go into quantizing."""
    from halfbyte.config.target import check_parent
    from halfbyte.errors import ConfigError

    if report is None and eval_data is not None:
        raise ConfigError("needs --report", where="--eval-data", fix="Give --report PAGE.html, too")
    if report is not None and init == "pissa":
        raise ConfigError(
            "shows a base, and pissa's is not the model without its start", where="--report", fix="Leave it out"
        )
    if report is not None and report.suffix != ".html":
        raise ConfigError(
            f"{report} is not a .html file", where="--report", why="the .json of its name lies beside it"
        )
    if report is not None:
        check_parent(report)
    if eval_data is not None and not eval_data.is_file():
        raise ConfigError(f"there is no file {eval_data}", where="--eval-data")


def _report(run: RunConfig, output: Path, page: Path) -> tuple[dict[str, Any], str]:
    """Write the page and its JSON; the figures of all layers together, for --json and for people."""
    from halfbyte.checkpoint import write_file
    from halfbyte.compare.weights import weight_report
    from halfbyte.compare.weights_page import weights_page

    found = weight_report(run, output)
    write_file(page.with_suffix(".json"), json.dumps(found.to_dict(), indent=1).encode())
    write_file(page, weights_page(found).encode())
    line = f"error {found.error:.3e}"
    if found.perplexity is not None and found.perplexity_16bit is not None:
        line += f", perplexity {found.perplexity_16bit:.3f} -> {found.perplexity:.3f}"
    return {key: value for key, value in found.to_dict().items() if key not in ("layers", "histogram")}, line
