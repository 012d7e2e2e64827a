"""The house rules of docs/design.md, read from the source: who imports whom, how long things are, what stays out."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import halfbyte

SOURCE = Path(halfbyte.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

ROOMS = [
    {"errors", "dtypes"}, {"config"}, {"quant", "elsewhere"}, {"kernels"}, {"nn", "store", "checkpoint"},
    {"model", "data", "optim", "plan"}, {"report"}, {"train", "calibrate", "merge", "serve"}, {"compare"},
    {"cli"},
]  # fmt: skip
"""A room imports only from rooms to its left; rooms in one brace do not import each other."""
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
FUNCTIONS_THAT_MAY_BE_LONGER = {"train/loop.py:_train": 90}
"""The loop is one function to be read from top to bottom (DESIGN.md §2)."""

CALLABLE_ROOMS = {"merge", "plan", "train"}
"""`halfbyte.train` is a room and a public function of the same name, so its __init__ also makes the room callable."""

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "eval", "exec"}


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands in the file."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            yield node.lineno, str(node.module)
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_room_is_on_the_plan() -> None:
    found = {room_of(file) for file in FILES} - {"__init__", "__main__"}
    assert found <= set(RANK), "a new room needs its place in DESIGN.md §2 and in ROOMS"
    assert {"quant", "nn", "model", "train"} <= found


def test_rooms_import_only_to_their_left() -> None:
    wrong = []
    for file in FILES:
        room = room_of(file)
        for line, name in imported_modules(file):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top != "halfbyte" or other not in RANK or other == room or room not in RANK:
                continue
            if RANK[other] >= RANK[room]:
                wrong.append(f"{file.relative_to(SOURCE)}:{line} imports {name}")
    assert wrong == []


def test_the_planner_needs_no_torch() -> None:
    """plan/, errors, dtypes and config are read by `halfbyte plan --help`."""
    light = [file for file in FILES if room_of(file) in ("errors", "dtypes", "config", "plan")]
    heavy = {"torch", "transformers", "peft", "numpy", "accelerate", "safetensors"}
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports {name}"
        for file in light
        for line, name in imported_modules(file)
        if name.partition(".")[0] in heavy
    ]
    assert len(light) >= 4
    assert wrong == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_and_functions_are_short(file: Path) -> None:
    """Files of about 300 lines (350 at most), functions of about 60."""
    lines = file.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{lines} lines: say it shorter, or give part of it a file of its own"
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            name = f"{file.relative_to(SOURCE).as_posix()}:{node.name}"
            assert length <= FUNCTIONS_THAT_MAY_BE_LONGER.get(name, MAX_FUNCTION_LINES), f"{name} has {length} lines"


def test_room_inits_hold_public_names_only() -> None:
    """A docstring, imports, and __all__ that names what is imported, but for modules imported to register."""
    for file in SOURCE.glob("*/__init__.py"):
        if file.parent.name in CALLABLE_ROOMS:
            continue
        tree = tree_of(file)
        where = str(file.relative_to(SOURCE))
        assert ast.get_docstring(tree), f"{where} says what the room is for"
        imported: set[str] = set()
        exported: list[str] = []
        for statement in tree.body[1:]:
            if isinstance(statement, ast.ImportFrom):
                imported |= {alias.asname or alias.name for alias in statement.names}
            elif isinstance(statement, ast.Assign):
                assert [target.id for target in statement.targets if isinstance(target, ast.Name)] == ["__all__"], (
                    where
                )
                exported = ast.literal_eval(statement.value)
            else:
                pytest.fail(f"{where}:{statement.lineno} holds {type(statement).__name__}")
        assert sorted(exported) == sorted(set(exported)), where
        registering = {module.stem for module in file.parent.glob("*.py")}
        assert imported - {"annotations"} <= set(exported) | registering, where
        assert not [name for name in exported if name.startswith("_")], where


def test_every_module_says_what_it_is_for() -> None:
    assert [str(file) for file in FILES if not ast.get_docstring(tree_of(file))] == []


def calls(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_print_only_in_the_command_line() -> None:
    wrong = [
        f"{file.relative_to(SOURCE)}:{line}"
        for file in FILES
        for line, name in calls(file)
        if name == "print" and room_of(file) != "cli"
    ]
    assert wrong == []


def test_nothing_that_can_run_code_is_read() -> None:
    """No pickle, no torch.load, no eval: files are data. trust_remote_code is never anything but False."""
    wrong = []
    for file in FILES:
        where = file.relative_to(SOURCE)
        wrong += [f"{where}:{n} imports {m}" for n, m in imported_modules(file) if m in FORBIDDEN_IMPORTS]
        wrong += [f"{where}:{n} calls {name}" for n, name in calls(file) if name in FORBIDDEN_CALLS]
        for node in ast.walk(tree_of(file)):
            if (
                isinstance(node, ast.keyword)
                and node.arg == "trust_remote_code"
                and ast.unparse(node.value) != "False"
            ):
                wrong.append(f"{where}:{node.value.lineno} trusts remote code")
    assert wrong == []


def test_the_environment_is_read_in_two_places_only() -> None:
    wrong = [
        f"{file.relative_to(SOURCE)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
        and room_of(file) != "cli" and file.relative_to(SOURCE).as_posix() != "kernels/registry.py"
    ]  # fmt: skip
    assert wrong == []


def test_public_names_are_few_and_there() -> None:
    """`halfbyte.__all__`: at most 20 names, each resolves, none is imported before it is asked for."""
    names = getattr(halfbyte, "__all__", [])
    assert len(names) <= 20
    for name in names:
        assert getattr(halfbyte, name) is not None
    top = [node for node in ast.walk(tree_of(SOURCE / "__init__.py")) if isinstance(node, ast.ImportFrom)]
    assert not [node for node in top if str(node.module).startswith("halfbyte.") and node.col_offset == 0]


def test_no_large_file_is_tracked() -> None:
    """Models and other results of a run belong into folders that git ignores."""
    root = SOURCE.parent.parent
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [root / name for name in listed.stdout.split("\0") if name]
    assert not [file for file in files if file.is_file() and file.stat().st_size > 1_000_000]
