"""The `halfbyte` command: every command in one place, each importing what it needs when it runs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextvars import copy_context

import typer

from halfbyte.cli.chat import chat
from halfbyte.cli.compare import compare
from halfbyte.cli.data import data_app
from halfbyte.cli.demo import demo
from halfbyte.cli.doctor import doctor
from halfbyte.cli.evaluate import evaluate
from halfbyte.cli.generate import generate
from halfbyte.cli.import_config import import_config
from halfbyte.cli.init import init
from halfbyte.cli.merge import merge
from halfbyte.cli.plan import plan
from halfbyte.cli.quantize import quantize
from halfbyte.cli.ranks import tell_torchrun
from halfbyte.cli.runs import runs_app
from halfbyte.cli.selftest import selftest
from halfbyte.cli.serve import serve
from halfbyte.cli.train import train
from halfbyte.cli.usage import usage_text
from halfbyte.errors import DISK_ERRNOS, HalfbyteError

INTERRUPTED = 130
CLOSED_PIPE = 141

app = typer.Typer(
    help="QLoRA fine-tuning on the machine you have: the base model quantized, adapters on top.",
    epilog="Start with: halfbyte demo. Every command has --help, and --json for scripts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(init)
app.command()(train)
app.command()(plan)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(quantize)
app.command()(merge)
app.command()(compare)
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")
app.command("import-config")(import_config)
app.command()(doctor)
app.command()(selftest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Whatever goes wrong is one line on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Before torch is imported. OpenMP threads that spin while they wait hold up each other as soon as anything else
    # runs on the machine: measured 40 tokens/s spinning, 220 sleeping, on two cores with one other process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if "--debug" not in arguments:
        _quiet_other_libraries()
    try:
        code = copy_context().run(app, args=arguments, prog_name="halfbyte", standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this, without a word
            return _fail("interrupted", INTERRUPTED)
        return code if isinstance(code, int) else 0
    except typer.Exit as exit_:
        return exit_.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        return CLOSED_PIPE
    except SystemExit as end:  # what typer makes of it
        if isinstance(end.__context__, BrokenPipeError):
            return CLOSED_PIPE
        raise
    except Exception as error:  # the last resort: no traceback unless it is asked for
        if "--debug" in arguments:
            raise
        return _explain(error)


def _quiet_other_libraries() -> None:
    """What they log and warn is for developers (--debug shows it); a user's error is to be one line."""
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")


def _explain(error: Exception) -> int:
    if isinstance(error, HalfbyteError):
        return error.exit_code if error.said else _fail(str(error), error.exit_code)
    if isinstance(error, typer.exceptions.TyperException):
        return _fail(usage_text(error), 2) if error.format_message() else 2  # without a word: it showed the help
    if isinstance(error, OSError) and (error.filename or error.errno in DISK_ERRNOS):
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}. Check the path, its permissions and the disk.", 4)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return _fail(
            f"out of memory, with {_peak()} in use at most. Lower train.micro_batch_size or data.max_seq_len, or set "
            "train.gradient_checkpointing=true; checkpoints are as they were.", 4,
        )  # fmt: skip
    if type(error).__name__ == "OutOfMemoryError":  # torch's; not imported for this
        return _fail("the GPU's memory: not enough for this. Give --memory more, or --device cpu.", 4)
    return _fail(
        f"internal error: {type(error).__name__}: {str(error)[:300]}. Run again with --debug and report it.", 1
    )


def _peak() -> str:
    from halfbyte.dtypes import format_bytes
    from halfbyte.model.memory import peak_memory

    return format_bytes(peak_memory())


def _fail(message: str, code: int) -> int:
    line = "halfbyte: " + " ".join(message.split())
    print(line, file=sys.stderr)
    tell_torchrun(os.environ, line)
    return code


def run() -> None:
    """The console script."""
    sys.exit(main())
