"""``halfbyte quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.common import AsJson, Config, Debug, Memory, Model, Set, console, emit, load_run


def quantize(
    model: Model = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder to write.")] = None,
    quant_type: Annotated[str | None, typer.Option("--quant-type", metavar="nf4|fp4", help="The codebook.")] = None,
    config: Config = None,
    memory: Memory = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a model in bitsandbytes' 4-bit format; transformers and halfbyte load the folder.

    Reads tensor by tensor, large ones slice by slice: memory holds one tensor at a time. With quant.calibrate
    scales and codes are chosen on a text, layer by layer.
    """
    from halfbyte.dtypes import format_bytes
    from halfbyte.errors import ConfigError

    flags = {
        "--model": ("model.path", model), "--quant-type": ("quant.quant_type", quant_type),
        "--memory": ("memory.budget", memory),
    }  # fmt: skip
    run = load_run(config, settings, flags)
    if output is None:
        raise ConfigError("is not set", where="--output", fix="Give a folder to write")
    from halfbyte.cli.progress import LoadBar
    from halfbyte.model.quantize import QuantizeResult, quantize_model

    out = console()
    with LoadBar(out) as bar:
        if run.quant.calibrate:
            from halfbyte.calibrate import calibrate_model
            from halfbyte.train.match import match_start

            result: QuantizeResult = calibrate_model(
                run, output, match=match_start, say=out.print, on_progress=bar.update
            )
        else:
            result = quantize_model(run.model.path, output, run.quant, on_progress=bar.update)
    text = (
        f"{format_bytes(result.bytes_in)} -> {format_bytes(result.bytes_out)}, {result.quantized} layers at "
        f"{result.bits_per_weight:.3f} bits per weight, in {result.seconds:.1f} s, "
        f"peak memory {format_bytes(result.peak_memory)}\n{result.output}"
    )
    emit(result.to_dict(), as_json, text)
