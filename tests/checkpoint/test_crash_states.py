"""No moment of a save loses what was saved before: every state of the disk after a kill, or after a power cut."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.crash import Op, crash_states, read_log, write_tree
from faults.preload import build, drive
from faults.scenarios import SCENARIOS, quiet

SHORT = 1000  # of faultio.c
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, SHORT)


@pytest.fixture(scope="session")
def faultio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("faultio"))


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is quick to fill and empty."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path))
    yield folder / "scratch"
    shutil.rmtree(folder)


def recorded(name: str, faultio: Path, folder: Path) -> tuple[Path, list[Op]]:
    """(the folder as it was before the save, the save's operations)."""
    root, before, log = folder / "saves", folder / "before", folder / "log"
    root.mkdir()
    SCENARIOS[name].prepare(root)
    shutil.copytree(root, before)
    drive(faultio, "record", name, root, log)
    return before, read_log(log, root)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_crash_state_is_the_old_or_the_new(
    name: str, faultio: Path, tmp_path: Path, memory_disk: Path, record_property: Callable[[str, object], None]
) -> None:
    quiet()
    before, ops = recorded(name, faultio, tmp_path)
    scenario, scratch, found = SCENARIOS[name], memory_disk, Counter[tuple[str, str]]()
    for number, model, tree in crash_states(before, ops):
        write_tree(tree, scratch)
        try:
            held = scenario.read(scratch)
        except Exception as error:
            pytest.fail(f"{model} after {number} of {len(ops)} operations: {error}\n{sorted(tree)}")
        found[model, held] += 1
        if number == len(ops):
            assert held == "new", f"{model}: the save came back, and then it was lost"
    record_property("operations", len(ops))
    for model in ("kill", "power"):
        record_property(f"{model} states recovered", f"{found[model, 'old'] + found[model, 'new']}")
    assert all(found[model, held] for model in ("kill", "power") for held in ("old", "new")), found


@pytest.mark.parametrize(
    ("name", "errors"),
    [("checkpoint", ERRORS[:1]), *(pytest.param(name, ERRORS, marks=pytest.mark.slow) for name in SCENARIOS)],
)
@pytest.mark.timeout(900)
def test_any_operation_may_fail(
    name: str, errors: tuple[int, ...], faultio: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The n-th operation fails, for every n: one clear error or none, nothing is left behind, the next save works."""
    lines = drive(faultio, "sweep", name, tmp_path / "saves", *map(str, errors)).splitlines()
    runs = [json.loads(line) for line in lines]
    for run in runs:
        assert "broken" not in run, run["broken"]
        assert (run["again"], run["later"]) == ("new", []), run
        if run["fired"] and run["error"] != SHORT:
            assert (run["code"], run["held"]) in {(4, "old"), (4, "new"), (0, "new")}, run
        else:  # no fault, or a write that fell short: it goes on with the rest
            assert (run["code"], run["held"]) == (0, "new"), run
        assert run["code"] == 0 or "/saves/" in run["text"], run
        assert not run["strays"] or run["held"] == "new", run  # what could not be deleted waits for the next save
    assert len({run["files"] for run in runs}) == 1, "descriptors are left open"
    refused = sum(run["code"] == 4 for run in runs)
    record_property("faults", sum(run["fired"] for run in runs))
    record_property("refused with exit code 4", refused)
    assert refused >= 3 * sum(error != SHORT for error in errors)
