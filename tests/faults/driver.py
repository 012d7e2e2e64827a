"""Runs in a process that has faultio.so preloaded: python driver.py ACTION SCENARIO FOLDER [LOG | ERROR...].

record: the scenario's save with every operation written to LOG. sweep: the save again and again, each in a process of
its own (forked: nothing is imported anew), with operation 1, 2, 3... failing by each ERROR, until none is left; a JSON
line for each.
"""

from __future__ import annotations

import ctypes as ct
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

from faults.scenarios import SCENARIOS, Scenario, names_below, outcome, quiet

SHORT = 1000
shim = ct.CDLL(os.environ["LD_PRELOAD"])
shim.faultio_start.argtypes = [ct.c_char_p, ct.c_char_p, ct.c_long, ct.c_int]
shim.faultio_stop.restype = shim.faultio_fired.restype = ct.c_long


def start(root: Path, log: str = "", at: int = 0, what: int = 0) -> None:
    """Number operations below `root` from here on."""
    shim.faultio_start(os.fsencode(root), log.encode(), at, what)


def once(scenario: Scenario, root: Path, at: int, error: int) -> dict[str, object]:
    """One save whose `at`-th operation fails."""
    before = names_below(root)
    caught: BaseException | None = None
    start(root, "", at, error)
    try:
        scenario.act(root)
    except Exception as problem:
        caught = problem
    seen, fired = shim.faultio_stop(), bool(shim.faultio_fired())
    files = len(os.listdir("/proc/self/fd"))
    strays = [name for name in names_below(root) if "/." in f"/{name}" and name not in before]
    return {
        "at": at, "error": error, "fired": fired, "seen": seen, "held": scenario.read(root), "strays": strays,
        "files": files, **outcome(caught),
    }  # fmt: skip


def sweep(scenario: Scenario, root: Path, errors: list[int]) -> None:
    """Every operation, every error."""
    for error in errors:
        at = 0
        while True:
            at += 1
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            scenario.prepare(root)
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    line = json.dumps(once(scenario, root, at, error))
                except BaseException:
                    line = json.dumps({"at": at, "error": error, "fired": True, "broken": traceback.format_exc()})
                os.write(writer, line.encode())
                os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as answer:
                line = answer.read()
            os.waitpid(child, 0)
            scenario.act(root)  # and it goes on
            later = [name for name in names_below(root) if "/." in f"/{name}"]
            result = {**json.loads(line), "again": scenario.read(root), "later": later}
            sys.stdout.write(json.dumps(result) + "\n")
            if not result["fired"]:
                break


def main() -> None:
    """See the module."""
    action, name, folder, *rest = sys.argv[1:]
    scenario, root = SCENARIOS[name], Path(folder)
    quiet()
    if action == "record":
        start(root, rest[0])
        scenario.act(root)
        shim.faultio_stop()
    else:
        sweep(scenario, root, [int(error) for error in rest])


main()
