"""The keyword arguments of a Python script's calls to Unsloth, TRL, PEFT and transformers: parsed, never run."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

_MODEL = ("from_pretrained",)
_DATA = ("load_dataset",)
_TRAINERS = ("SFTTrainer", "UnslothTrainer", "Trainer")
_CALLS = re.compile(
    r"from_pretrained|get_peft_model|load_dataset|BitsAndBytesConfig|LoraConfig|\w*TrainingArguments|\w+Trainer|Trainer|"
    r"(SFT|DPO|IPO|ORPO|CPO|KTO|GRPO|RLOO|PPO|Reward)Config"
)
"""Functions and classes whose arguments are a run's settings, by their last name."""
_OBJECTS = {
    "args", "callbacks", "compute_metrics", "data_collator", "dataset", "eval_dataset", "formatting_func",
    "model_name", "peft_config", "processing_class", "quantization_config", "ref_model", "tokenizer", "train_dataset",
}  # fmt: skip
"""Arguments that may be objects: what was given to them is read where they are made."""
TRAINER = "trainer"
"""The key under which a trainer stands that is not for supervised fine-tuning."""


class NotWritten(str):
    """A value that a script computes, as it stands there."""


def is_script(name: str, text: str) -> bool:
    """Whether the file `name` of this text is a Python script."""
    return name.endswith(".py") or re.search(rf"(^|[\s.=])({_CALLS.pattern})\(", text) is not None


def read_script(text: str) -> dict[str, Any]:
    """The arguments by name; of a name given twice, in two calls, the first.

    Values are literals, or names that are set to one once; what is computed is a `NotWritten`. A notebook's lines that
    begin with ``!`` or ``%`` are passed over.

    Raises:
        ValueError: it is no Python, with the line.
    """
    lines = ["" if line.lstrip().startswith(("!", "%")) else line for line in text.splitlines()]
    try:
        with warnings.catch_warnings():  # of the parser, about the script's own texts
            warnings.simplefilter("ignore")
            tree = ast.parse("\n".join(lines))
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from None
    except MemoryError:  # the parser's own stack
        raise ValueError("nested too deeply") from None
    names = _constants(tree)
    found: dict[str, Any] = {}
    for name, call in _calls(tree):
        for key, node in _arguments(name, call):
            if key not in found and not (key in _OBJECTS and not _is_literal(node, names)):
                found[key] = _value(node, names)
        if name.endswith("Trainer") and name not in _TRAINERS:
            found.setdefault(TRAINER, name)
    return found


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Those of `_CALLS`, in their order, each with its last name; of loading a model the first, no tokenizer's."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    seen = set[str]()
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        name = ast.unparse(call.func)
        last = name.rpartition(".")[2]
        passed_over = last in _MODEL and re.search(r"Tokenizer|Processor|Config\.", name)
        if _CALLS.fullmatch(last) and not passed_over and not (last in (*_MODEL, *_DATA) and last in seen):
            seen.add(last)
            yield last, call


def _arguments(name: str, call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    named = {word.arg: word.value for word in call.keywords if word.arg is not None}
    first = call.args[0] if call.args else None
    if name in _DATA:
        files = named.get("data_files", first)
        if files is not None:
            yield "dataset_name", files.values[0] if isinstance(files, ast.Dict) and files.values else files
        return
    if name in _MODEL and first is not None:
        yield "model_name", first
    for key, node in named.items():
        yield ("model_name" if key in ("model", "pretrained_model_name_or_path") else key), node


def _constants(tree: ast.AST) -> Mapping[str, ast.expr]:
    """What names stand for that are set once, to a literal."""
    stored = Counter(
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    return {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and stored[node.targets[0].id] == 1
    }


def _is_literal(node: ast.expr, names: Mapping[str, ast.expr]) -> bool:
    return not isinstance(_value(node, names), NotWritten)


def _value(node: ast.expr, names: Mapping[str, ast.expr]) -> Any:
    """Of a literal, a name of one, or a dtype such as torch.bfloat16."""
    if isinstance(node, ast.Name):
        node = names.get(node.id, node)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return node.attr
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return NotWritten(ast.unparse(node))
    return list(value) if isinstance(value, tuple | set) else value
