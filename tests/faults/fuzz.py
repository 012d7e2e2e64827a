"""Changes good files at random and reads them: python fuzz.py READER COUNT SEED; a JSON line at the end.

Each reader must give what is in the file, or a HalfbyteError of one line, within seconds and some memory; a crash, a
hang or any other exception ends this with the file kept under /tmp.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from faults.mutate import mutate
from faults.readers import CHECKPOINT_FILES, READERS, Reader, read_checkpoint
from faults.scenarios import SCENARIOS, quiet

from halfbyte.errors import HalfbyteError

SECONDS, MORE_MEMORY = 5, 500_000_000


def outcome(reader: Reader, folder: Path) -> str:
    """ "" for a file that is read, else the refusal."""
    signal.alarm(SECONDS)
    try:
        reader.read(folder)
    except HalfbyteError as error:
        text = str(error)
        assert text.strip(), f"{text!r} is no clear line"
        return f"{type(error).__name__}: {text}"
    finally:
        signal.alarm(0)
    return ""


def accepted_by(reader: Reader, folder: Path) -> bool:
    """What the other reader thinks."""
    assert reader.oracle is not None
    try:
        reader.oracle(folder)
    except Exception:
        return False
    return True


def fuzz(name: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """`count` changed files for the reader `name`."""
    reader, chance = READERS[name], random.Random(seed)
    reader.make(folder)
    good = (folder / reader.file).read_bytes()
    assert not outcome(reader, folder), "the good file is refused"
    found: Counter[str] = Counter()
    differ: dict[str, int] = {}
    for _ in range(count):
        (folder / reader.file).write_bytes(mutate(good, chance, reader.mutations))
        refusal = outcome(reader, folder)
        found["refused" if refusal else "read"] += 1
        if reader.oracle is not None and accepted_by(reader, folder) != (not refusal):
            reason = refusal.partition(": ")[2].rpartition("/")[2] or "read, and refused by the other"
            differ[reason[:120]] = differ.get(reason[:120], 0) + 1
    return {**found, "differ": differ}


def flips(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Bits of a checkpoint changed, one at a time: every one is found."""
    chance = random.Random(seed)
    SCENARIOS["checkpoint"].prepare(folder)
    path = folder / "run" / "checkpoint-1"
    found = 0
    for number in range(count):
        file = path / CHECKPOINT_FILES[number % len(CHECKPOINT_FILES)]
        good = file.read_bytes()
        changed = bytearray(good)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        try:
            read_checkpoint(folder)
        except HalfbyteError:
            found += 1
        else:
            assert file.name == "manifest.json", f"a bit of {file.name} was changed and not found"
            assert json.loads(changed)["files"] == json.loads(good)["files"], "a changed manifest passes"
        file.write_bytes(good)
    read_checkpoint(folder)
    return {"found": found, "without effect": count - found}


def main() -> None:
    """See the module."""
    name, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    quiet()
    folder = Path(tempfile.mkdtemp(prefix="halfbyte-fuzz-"))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE_MEMORY, resource.RLIM_INFINITY))
    result = flips(count, seed, folder) if name == "bit flips" else fuzz(name, count, seed, folder)
    shutil.rmtree(folder)  # an exception leaves it, with the file that caused it
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
