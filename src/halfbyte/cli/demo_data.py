"""A question-and-answer set that is on every machine: the docstrings of Python's own standard library."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
ANSWER_CHARS = range(30, 500)


def write_docstring_qa(train: Path, held_out: Path, *, num_train: int, num_held_out: int) -> tuple[int, int]:
    """Write two chat JSONL files, disjoint and the same on every run of one Python; returns their lengths."""
    pairs = dict(_questions())
    ordered = sorted(pairs, key=lambda question: hashlib.sha256(question.encode()).digest())
    parts = {held_out: ordered[:num_held_out], train: ordered[num_held_out : num_held_out + num_train]}
    for path, questions in parts.items():
        lines = (
            json.dumps(
                {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": pairs[q]}]},
                ensure_ascii=False,
            )
            for q in questions
        )
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(parts[train]), len(parts[held_out])


def _questions() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for kind, name, docstring in _documented(tree, module):
            answer = inspect.cleandoc(docstring).split("\n\n")[0].strip()
            if len(answer) in ANSWER_CHARS and ">>>" not in answer and answer not in seen:
                seen.add(answer)
                yield f"In Python, what does the {kind} `{name}` do?", answer


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            is_class = isinstance(child, ast.ClassDef)
            kind = "class" if is_class else "method" if isinstance(node, ast.ClassDef) else "function"
            docstring = ast.get_docstring(child)
            if docstring:
                yield kind, f"{prefix}.{child.name}", docstring
            if is_class:
                yield from _documented(child, f"{prefix}.{child.name}")
