"""``halfbyte serve``."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.common import (
    AsJson,
    Config,
    Debug,
    Device,
    Memory,
    Model,
    Set,
    check_adapter_fits,
    console,
    emit,
    known_machine,
    open_base,
)

if TYPE_CHECKING:
    from halfbyte.config import RunConfig
    from halfbyte.model.batch import BatchDecoder
    from halfbyte.model.plain_batch import PlainBatch
    from halfbyte.serve import Adapters, Room
    from halfbyte.serve.guard import Keys
    from halfbyte.serve.text import Texts

API_KEY, ADMIN_KEY = "HALFBYTE_API_KEY", "HALFBYTE_ADMIN_KEY"
NEEDED = ("starlette", "uvicorn", "pydantic")


def serve(
    model: Model = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=DIR", help="Serve an adapter; repeatable.")
    ] = None,
    adapter_dir: Annotated[
        Path | None, typer.Option("--adapter-dir", help="Where the admin may load adapters from, by name.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Of the base, for requests; default: the model's.")] = "",
    memory: Memory = None,
    host: Annotated[str, typer.Option("--host", help="Any but this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for any.")] = 8000,
    batch: Annotated[int, typer.Option("--batch", min=1, max=64, help="Answers that are written at once.")] = 16,
    queue: Annotated[int, typer.Option("--queue", min=1, max=10_000, help="Requests that may wait.")] = 64,
    context: Annotated[int, typer.Option("--context", min=16, help="Longest prompt and answer, in tokens.")] = 4096,
    cache_tokens: Annotated[
        int, typer.Option("--cache-tokens", min=16, help="Tokens whose keys and values are kept, of all requests.")
    ] = 16384,
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", help=f"Instead of {API_KEY}.")] = None,
    admin_key_file: Annotated[Path | None, typer.Option("--admin-key-file", help=f"Instead of {ADMIN_KEY}.")] = None,
    device: Device = None,
    config: Config = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """An OpenAI-compatible server: adapters by name over one 4-bit base, batched together."""
    from contextlib import closing
    from dataclasses import replace

    from halfbyte.config import load_config

    _check_extra()
    from halfbyte.kernels.buffers import steady_memory
    from halfbyte.serve.start import Settings, bind
    from halfbyte.serve.start import serve as run_server

    flags = {"model__path": model, "model__device": device, "memory__budget": memory}
    run, out = load_config(config, settings or (), **flags), console()
    _log_to_stderr(debug)
    chosen = Settings(host=host, port=port, batch=batch, queue=queue, keys=_keys(api_key_file, admin_key_file))
    _check_folder(adapter_dir)
    named = [_named(text) for text in adapter or ()]
    positions = max(cache_tokens, context)
    with closing(bind(chosen)) as listening, steady_memory():
        planned, plan_text, room = _plan(run, [folder for _, folder in named], positions, context)
        decoder, adapters, texts, notes = open_served(run, name, named, adapter_dir, room, positions, context)

        def ready(url: str) -> None:
            models = [served.name for served in adapters.all()]
            for note in [*notes, plan_text, f"listening on {url}, serving {', '.join(models)}"]:
                out.print(note, style="dim", markup=False)
            emit({"url": url, "models": models, "predicted_peak_memory": planned}, as_json)

        run_server(decoder, adapters, texts, replace(chosen, planned_memory=planned), listening, ready)


def open_served(
    run: RunConfig, name: str, named: list[tuple[str, Path]], adapter_dir: Path | None, room: Room | None,
    positions: int, context: int,
) -> tuple[BatchDecoder | PlainBatch, Adapters, Texts, list[str]]:  # fmt: skip
    """What computes, what it serves, the tokenizer's side, and notes for the user."""
    from halfbyte.checkpoint import load_adapter
    from halfbyte.model.generate import stop_ids
    from halfbyte.serve import Adapters
    from halfbyte.serve.text import Texts

    loaded, tokenizer, notes = open_base(run, load_adapter(named[0][1]) if named else None, console())
    decoder, more = _decoder(loaded.model, positions, context)
    notes += more
    adapters = Adapters(
        name or base_name(str(run.model.path)), lay_out=decoder.load, folder=adapter_dir, room=room,
        check=lambda saved: check_adapter_fits(run, saved, loaded, tokenizer),
    )  # fmt: skip
    for adapter_name, folder in named:
        notes += adapters.load(adapter_name, folder)
    return decoder, adapters, Texts(tokenizer, stops=stop_ids(loaded.model, tokenizer), context=decoder.context), notes


def _plan(run: RunConfig, folders: list[Path], cache_tokens: int, context: int) -> tuple[int, str, Room | None]:
    """Most memory in bytes, the plan in words, and what a budget leaves for adapters; before anything is loaded.

    Raises:
        ResourceError: it does not fit.
    """
    from halfbyte.dtypes import format_bytes
    from halfbyte.errors import ResourceError
    from halfbyte.model.memory import resident_memory
    from halfbyte.plan import Serving, budget_of, compute_dtype, plan_serving, read_base, serving_text, tokenizer_bytes
    from halfbyte.serve import Room

    machine, budget = known_machine(), budget_of(run)
    base = read_base(run.model.path, run.quant, compute_dtype(run, machine))
    made = plan_serving(run, base, machine, Serving(
        cache_tokens=cache_tokens, context=context, adapters=folders,
        runtime=resident_memory() + tokenizer_bytes(base),
    ))  # fmt: skip
    text = serving_text(made, budget)
    if budget is None:
        return made.peak_memory, text, None
    if made.peak_memory > budget.bytes:
        least, most = made.with_cache(context).peak_memory, made.most_cache_tokens(budget.bytes)
        fits = f"--cache-tokens {most} fits" if most >= context else f"{format_bytes(least)} is the least"
        raise ResourceError(
            f"{format_bytes(made.peak_memory)} are needed, {format_bytes(budget.bytes)} are allowed",
            where=budget.source, why=text,
            fix=f"Give --memory more, a smaller --cache-tokens or fewer adapters: {fits}",
        )  # fmt: skip
    return made.peak_memory, text, Room(made.room_for_adapters(budget.bytes), made.adapter_itemsize)


def _decoder(model: Any, positions: int, context: int) -> tuple[BatchDecoder | PlainBatch, list[str]]:
    """What computes, and a note where that is not the native step."""
    from halfbyte.model.batch import BatchDecoder
    from halfbyte.model.decoder_parts import NotCoveredError
    from halfbyte.model.plain_batch import PlainBatch

    model.eval()
    try:
        decoder = BatchDecoder(model, positions=positions, context=context)
        decoder.try_out()
    except NotCoveredError as error:
        note = f"served through transformers, one sequence at a time: {error}"
        return PlainBatch(model, positions=positions, context=context), [note]
    return decoder, []


def base_name(path: str) -> str:
    """The last part of a folder, file or hub id, with what a name may not have replaced."""
    last = path.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:64] or "base"


def _check_extra() -> None:
    from halfbyte.errors import ResourceError

    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ResourceError(f"needs {', '.join(missing)}", where="serve", fix='Run pip install "halfbyte[serve]"')


def _check_folder(adapter_dir: Path | None) -> None:
    from halfbyte.errors import ConfigError

    if adapter_dir is not None and not adapter_dir.is_dir():
        raise ConfigError("is no folder", where=f"--adapter-dir {adapter_dir}", fix="Make it, or leave this out")


def _named(text: str) -> tuple[str, Path]:
    from halfbyte.errors import ConfigError

    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ConfigError(f"{text!r} is not NAME=DIR", where="--adapter", fix="Write --adapter NAME=DIR")
    return name, Path(folder)


def _keys(api_key_file: Path | None, admin_key_file: Path | None) -> Keys:
    from halfbyte.errors import ConfigError
    from halfbyte.serve.guard import Keys

    def read(file: Path | None, variable: str) -> str | None:
        key = file.read_text(encoding="utf-8").strip() if file else os.environ.get(variable, "")
        if (file or key) and len(key) < 8:
            raise ConfigError("a key of fewer than 8 characters", where=str(file or variable), fix="Take a longer one")
        return key or None

    keys = Keys(user=read(api_key_file, API_KEY), admin=read(admin_key_file, ADMIN_KEY))
    if keys.user is not None and keys.user == keys.admin:
        raise ConfigError("is also the users' key", where=ADMIN_KEY, fix="Take another one")
    return keys


def _log_to_stderr(debug: bool) -> None:
    handler: Any = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for each in ("halfbyte.serve", "uvicorn"):
        logging.getLogger(each).addHandler(handler)
        logging.getLogger(each).setLevel(
            logging.DEBUG if debug else logging.INFO if each != "uvicorn" else logging.WARNING
        )
