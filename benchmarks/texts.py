"""Texts that come with Python and Debian, as data sets: made once a folder, which can be taken to another machine."""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

from halfbyte.cli.demo_data import SKIPPED_FOLDERS, write_docstring_qa

LICENCES = ("Artistic", "GFDL-1.3", "MPL-2.0", "CC0-1.0")
TRAIN, HELD_OUT = 1500, 120


def docstring_data(folder: Path, num_train: int = TRAIN, num_held_out: int = HELD_OUT) -> tuple[Path, Path]:
    """The demo's question-and-answer files."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    if (_lines(train), _lines(held_out)) != (num_train, num_held_out):
        write_docstring_qa(train, held_out, num_train=num_train, num_held_out=num_held_out)
    return train, held_out


def function_data(folder: Path) -> tuple[Path, Path]:
    """The standard library's functions by their names, which are the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "functions.jsonl", folder / "functions-held-out.jsonl"
    if (_lines(train), _lines(held_out)) != (TRAIN, HELD_OUT):
        pairs = _functions()
        ordered = sorted(pairs, key=lambda question: hashlib.sha256(question.encode()).digest())
        parts = {held_out: ordered[:HELD_OUT], train: ordered[HELD_OUT : HELD_OUT + TRAIN]}
        for path, questions in parts.items():
            turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": pairs[q]}] for q in questions]
            path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")
    return train, held_out


def _functions() -> dict[str, str]:
    root, pairs, seen = Path(sysconfig.get_paths()["stdlib"]), dict[str, str](), set[str]()
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if (SKIPPED_FOLDERS - {"__pycache__"}) & set(parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
            nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in (n for n in nodes if not n.name.startswith("__")):
            code = textwrap.dedent(" " * node.col_offset + (ast.get_source_segment(text, node) or ""))
            if 80 <= len(code) <= 600 and code not in seen:
                seen.add(code)
                pairs.setdefault(f"Write the Python function `{node.name}` of the module `{'.'.join(parts)}`.", code)
    return pairs


def prose_file(folder: Path) -> Path:
    """40 texts of Python's reference."""
    return _write(folder / "prose.jsonl", [topics[name][:2000] for name in sorted(topics)][:40])


def licence_file(folder: Path) -> Path:
    """English that has nothing to do with programming, in pieces."""
    text = licences()
    parts = [text[i : i + 2000] for i in range(0, len(text), 2000)]
    return _write(folder / "licences.jsonl", [part for part in parts if part.strip()])


def licences() -> str:
    """Debian's copies of four."""
    return "".join(Path("/usr/share/common-licenses", name).read_text(encoding="utf-8") for name in LICENCES)


def _write(path: Path, texts: list[str]) -> Path:
    if not path.exists():
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0
