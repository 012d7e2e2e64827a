"""What every command shares: its options, its output, and a model opened for use."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.checkpoint import Adapter as SavedAdapter
    from halfbyte.config import RunConfig
    from halfbyte.model import LoadedModel
    from halfbyte.plan import Machine

Model = Annotated[str | None, typer.Option("--model", help="A local folder, a .gguf file, or a hub id.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="An adapter folder, such as train leaves.")]
Config = Annotated[Path | None, typer.Option("--config", help="A TOML file with the sections of docs/config.md.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting, over all others; repeatable."),
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute; auto: cuda where there is.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Most memory of the device, 8GB; default: what it may take."),
]
HostMemory = Annotated[
    str | None, typer.Option("--host-memory", metavar="SIZE", help="The same for the host's RAM, beside a GPU.")
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def load_run(config: Path | None, settings: Sequence[str] | None, flags: Mapping[str, tuple[str, Any]]) -> RunConfig:
    """The run's settings; an error in what a flag set names the flag.

    Args:
        flags: (key, value or None) by the flag that sets it, such as "--memory": ("memory.budget", "8GB").
    """
    from halfbyte.config import hold_to, load_config
    from halfbyte.errors import ConfigError

    given = {key.replace(".", "__"): str(value) if isinstance(value, Path) else value for key, value in flags.values()}
    try:
        run = load_config(config, settings or (), **given)
        hold_to(run.limits)
        return run
    except ConfigError as error:
        for flag, (key, value) in flags.items():
            over = any(setting.partition("=")[0].strip() == key for setting in settings or ())
            if value is not None and not over and key in (error.where, error.what.partition(" ")[0]):
                raise ConfigError(error.what, where=flag, why=error.why, fix=error.fix) from None
        raise


class InterruptedRunError(HalfbyteError):
    """A signal ended the run (exit 128 and its number: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP)."""

    def __init__(self, number: int, why: str, fix: str = "") -> None:
        super().__init__("interrupted", why=why, fix=fix)
        self.exit_code = 128 + number


@contextmanager
def saying_what_is_kept(run: RunConfig) -> Iterator[None]:
    """Around a training run: a signal ends it with the checkpoint to go on from, if there is one.

    Raises:
        InterruptedRunError: by Ctrl-C, SIGTERM or SIGHUP.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        number = int(getattr(stop, "signal", signal.SIGINT))
        saved = {
            int(m.parent.name[11:]): m.parent for m in Path(run.train.output).glob("checkpoint-[0-9]*/manifest.json")
        }
        if not saved:
            why = "no step was finished and no checkpoint saved, so nothing is kept and the same command begins anew"
            raise InterruptedRunError(number, why) from None
        newest = saved[max(saved)]
        how = "the same command" if run.train.resume == "auto" else f"--resume {newest}"
        raise InterruptedRunError(number, f"{how} goes on from {newest}") from None


def known_machine() -> Machine:
    """This machine, with what earlier commands measured on it; without importing torch."""
    from halfbyte.plan import this_machine

    threads = os.environ.get("OMP_NUM_THREADS", "")
    return this_machine(calibration_file(), threads=int(threads) if threads.isdecimal() and int(threads) else None)


def calibration_file() -> Path:
    """Where measurements of this machine are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "halfbyte" / "machine.json"


def runs_file() -> Path:
    """Where this user's runs are listed."""
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local" / "state") / "halfbyte" / "runs.sqlite"


class Lasting:
    """A text stream that goes on in silence when nobody is left to read it: a closed terminal must not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, if that is possible."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console() -> Console:
    """For people: progress and notes go to standard error, so that standard output is the result alone."""
    from rich.console import Console

    return Console(file=cast(TextIO, Lasting(sys.stderr)), highlight=False, soft_wrap=True)


def emit(result: dict[str, Any], as_json: bool, text: str = "") -> None:
    """The command's result on standard output: one JSON object as the last line, or `text` for people."""
    if text and not as_json:
        print(text)
    if as_json:
        print(json.dumps(result))
    sys.stdout.flush()


def write_config(path: Path, text: str) -> None:
    """Write a new file.

    Raises:
        ConfigError: there is one already, or no folder for it.
    """
    from halfbyte.config.target import check_parent
    from halfbyte.errors import ConfigError

    check_parent(path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        fix = "Give another --output, or move this one away"
        raise ConfigError("is there already", where=str(path), fix=fix) from None


def with_base_of(run: RunConfig, saved: SavedAdapter | None) -> RunConfig:
    """`run` with its base quantized as the adapter `saved` records it, if it does.

    Raises:
        ConfigError: no base is named.
    """
    from dataclasses import replace

    from halfbyte.errors import ConfigError

    if not run.model.path:
        raise ConfigError("is not set", where="model.path", fix="Give --model")
    recipe = saved.info.get("quant") if saved is not None else None
    return replace(run, quant=run.quant.with_recipe(recipe)) if recipe else run


def load_base(
    run: RunConfig, out: Console, saved: SavedAdapter | None = None
) -> tuple[LoadedModel, list[str]]:  # fmt: skip
    """The base that `run` names, with rows for the tokens of `saved`, and notes for the user; on a GPU memory.budget
    holds from here on."""
    from halfbyte.cli.progress import LoadBar
    from halfbyte.dtypes import parse_bytes
    from halfbyte.model import choose_compute_dtype, load_model
    from halfbyte.model.device import choose_device
    from halfbyte.model.placement import Placement
    from halfbyte.model.tokens import NONE
    from halfbyte.model.trained_rows import tokens_of
    from halfbyte.store import memory_of

    device, why = choose_device(run.model.device)
    if device.type == "cuda" and run.memory.budget:
        from halfbyte.train.gpu import set_cap

        set_cap(device, parse_bytes(run.memory.budget))
    dtype, reason = choose_compute_dtype(run.quant.compute_dtype, device.type)
    notes = [f"device {device.type}: {why}", f"compute dtype {str(dtype).removeprefix('torch.')}: {reason}"]
    with LoadBar(out) as bar:
        placement = Placement(
            weights=run.memory.weights, resident_layers=run.memory.resident_layers, memory=memory_of(device)
        )
        loaded = load_model(
            run.model.path, run.quant, compute_dtype=dtype, placement=placement, device=device,
            on_progress=bar.update, tokens=NONE if saved is None else tokens_of(saved),
        )  # fmt: skip
    return loaded, notes + [text for text in (loaded.origin, loaded.stream_text) if text]


def check_adapter_fits(run: RunConfig, saved: SavedAdapter, loaded: LoadedModel, tokenizer: Any) -> list[str]:
    """Check that `saved` was trained on these very bytes; notes for the user. Raises AdapterError."""
    from halfbyte.checkpoint import check_base
    from halfbyte.model.source import tokenizer_sha256

    notes = check_base(
        saved, loaded.base_sha256, base=run.model.path, quant=loaded.quant,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
    )  # fmt: skip
    trained = saved.info.get("config", {}).get("quant", {}).get("embeddings", run.quant.embeddings)
    if trained != run.quant.embeddings:
        notes.append(f"adapter: trained with quant.embeddings={trained}, used with {run.quant.embeddings}")
    return notes


def read_adapter(run: RunConfig, adapter: Path | None) -> tuple[SavedAdapter | None, Any]:
    """The adapter, if one is given, and the tokenizer to use: its own, or that of the base that `run` names.

    Raises:
        ConfigError: no base is named.
    """
    from halfbyte.checkpoint import load_adapter
    from halfbyte.model.source import adapter_tokenizer

    saved = load_adapter(adapter) if adapter is not None and run.model.path else None
    with_base_of(run, saved)
    return saved, adapter_tokenizer(run.model.path, saved)


def open_model(run: RunConfig, adapter: Path | None, out: Console) -> tuple[LoadedModel, Any, Any, list[str]]:
    """Load the base that `run` names, and an adapter onto it after checking that it was trained on these very bytes.

    An adapter that records its base's quantization decides it, so that the base is the one it was trained on.

    Returns:
        the loaded base, the model to run, its tokenizer, and notes for the user.
    """
    from halfbyte.model.adapt import attach_saved
    from halfbyte.plan.start import check_whole

    saved, tokenizer = read_adapter(run, adapter)
    if saved is None:
        check_whole(run.model.path)
    loaded, notes = load_base(with_base_of(run, saved), out, saved)
    if saved is None:
        return loaded, loaded.model, tokenizer, notes
    notes += check_adapter_fits(run, saved, loaded, tokenizer)
    return loaded, attach_saved(loaded.model, saved), tokenizer, notes
