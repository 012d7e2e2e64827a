"""What torchrun tells its processes through the environment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import ConfigError, HalfbyteError

if TYPE_CHECKING:
    from halfbyte.train.ranks import Ranks


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """This process among those that torchrun started; alone where it was not torchrun.

    Raises:
        ConfigError: the environment names some of the numbers only.
    """
    from halfbyte.train.ranks import Ranks

    if "WORLD_SIZE" not in environment:
        return Ranks()
    kept = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return Ranks(
            rank=int(environment["RANK"]), world=int(environment["WORLD_SIZE"]),
            local_rank=int(environment["LOCAL_RANK"]), local_world=int(environment["LOCAL_WORLD_SIZE"]),
            attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)) if kept else 0,
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "WORLD_SIZE is set, and it is not torchrun that set it", where="environment", why=repr(error),
            fix="Start ranks with: torchrun --nproc-per-node N -m halfbyte train, or unset WORLD_SIZE",
        ) from None  # fmt: skip


def share_threads(environment: MutableMapping[str, str]) -> None:
    """Give each process its part of the machine's cores; before torch is imported.

    torchrun says 1 to several processes where the user says nothing.
    """
    count = environment.get("LOCAL_WORLD_SIZE", "1")
    if environment.get("OMP_NUM_THREADS") == "1" and count.isdecimal() and int(count) > 1:
        environment["OMP_NUM_THREADS"] = str(max(len(os.sched_getaffinity(0)) // int(count), 1))


@contextmanager
def one_voice(environment: Mapping[str, str], *kinds: type[HalfbyteError], patience: float = 0.0) -> Iterator[None]:
    """Around what ends every rank alike, with errors of these `kinds`: the first one of a machine speaks for all.

    Args:
        patience: seconds in which the first one is to have spoken and torchrun to have ended the others. Without, one
            that is quicker to fail has torchrun end the first before it speaks. Who is still there then speaks too.
    """
    try:
        yield
    except kinds as error:
        if environment.get("LOCAL_RANK", "0") != "0" and not error.said:
            time.sleep(patience)
            error.said = not patience
        raise


def tell_torchrun(environment: Mapping[str, str], line: str) -> None:
    """Leave `line` where torchrun looks for the cause, so that its account of the ranks ends with it."""
    path = environment.get("TORCHELASTIC_ERROR_FILE")
    if path:
        found = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": found}), encoding="utf-8")
