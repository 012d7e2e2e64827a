"""``halfbyte eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.common import (
    Adapter,
    AsJson,
    Config,
    Debug,
    Device,
    Model,
    Set,
    console,
    emit,
    load_run,
    open_model,
    read_adapter,
)


def evaluate(
    model: Model = None,
    adapter: Adapter = None,
    data: Annotated[Path | None, typer.Option("--data", help="Samples, JSON lines; default: data.eval.")] = None,
    device: Device = None,
    config: Config = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Loss and perplexity per supervised token, with or without an adapter."""
    from halfbyte.errors import ConfigError

    flags = {"--model": ("model.path", model), "--device": ("model.device", device), "--data": ("data.eval", data)}
    run = load_run(config, settings, flags)
    if not run.data.eval:
        raise ConfigError("is not set", where="data.eval", fix="Give --data")
    from halfbyte.data import load_data
    from halfbyte.train.evaluate import evaluate as run_evaluation
    from halfbyte.train.objective import Objective

    out = console()
    tokenized = load_data(run.data.eval, read_adapter(run, adapter)[1], run.data)
    loaded, adapted, _, notes = open_model(run, adapter, out)
    notes += [f"{count} samples dropped: {reason}" for reason, count in tokenized.report.dropped.items()]
    for note in notes:
        out.print(note, style="dim", markup=False)
    objective = Objective(loaded.model)
    objective.check_tokens(tokenized)
    with objective.ready():
        result = run_evaluation(adapted, objective, tokenized, max_tokens=max(2048, run.data.max_seq_len))
    fields = {
        "loss": result.loss, "perplexity": result.perplexity, "supervised_tokens": result.supervised_tokens,
        "samples": len(tokenized), "read": tokenized.report.read, "dropped": tokenized.report.dropped,
        "base_sha256": loaded.base_sha256,
    }  # fmt: skip
    text = f"loss {result.loss:.4f}, perplexity {result.perplexity:.3f} over {result.supervised_tokens:,} tokens"
    emit(fields, as_json, text)
