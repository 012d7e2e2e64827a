"""``halfbyte serve``."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.common import AsJson, Config, Debug, Device, Memory, Model, Set, console, emit, load_run
from halfbyte.cli.served import Wanted, open_served

if TYPE_CHECKING:
    from halfbyte.serve.guard import Keys

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
    """An OpenAI-compatible server: adapters by name over one quantized base, batched together."""
    from dataclasses import replace

    _check_extra()
    from halfbyte.kernels.buffers import steady_memory
    from halfbyte.serve.start import Settings, bind
    from halfbyte.serve.start import serve as run_server

    flags = {
        "--model": ("model.path", model),
        "--device": ("model.device", device),
        "--memory": ("memory.budget", memory),
    }
    run, out = load_run(config, settings, flags), console()
    chosen = Settings(host=host, port=port, batch=batch, queue=queue, keys=_keys(api_key_file, admin_key_file))
    _check_folder(adapter_dir)
    wanted = Wanted(
        name=name, named=[_named(text) for text in adapter or ()], folder=adapter_dir, context=context,
        positions=max(cache_tokens, context), answers=batch + queue,
    )  # fmt: skip
    with _log_to_stderr(debug), closing(bind(chosen)) as listening, steady_memory():
        served = open_served(run, wanted)

        def ready(url: str) -> None:
            models = [one.name for one in served.adapters.all()]
            for note in [*served.notes, f"listening on {url}, serving {', '.join(models)}"]:
                out.print(note, style="dim", markup=False)
            emit({"url": url, "models": models, "predicted_peak_memory": served.planned_memory}, as_json)

        with_plan = replace(chosen, planned_memory=served.planned_memory)
        run_server(served.decoder, served.adapters, served.texts, with_plan, listening, ready)


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


@contextmanager
def _log_to_stderr(debug: bool) -> Iterator[None]:
    """Inside, the server's log and uvicorn's complaints go to standard error."""
    handler: Any = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    levels = {"halfbyte.serve": logging.INFO, "uvicorn": logging.WARNING}
    for each, level in levels.items():
        logging.getLogger(each).addHandler(handler)
        logging.getLogger(each).setLevel(logging.DEBUG if debug else level)
    try:
        yield
    finally:
        for each in levels:
            logging.getLogger(each).removeHandler(handler)
