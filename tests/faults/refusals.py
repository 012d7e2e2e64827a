"""Good files spoilt in every way, and what docs/refusals.md promises for each: the whole line, and the exit code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "refusals.md"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
Change = Callable[[Path], object]
"""Spoils a folder that holds model/, data.jsonl and adapter/, all good."""


def promised(title: str) -> dict[str, tuple[int, str]]:
    """(exit code, line) by case, from the page's table under `title`; … stands for anything."""
    _, found, after = PAGE.read_text(encoding="utf-8").partition(f"<!-- table: {title} -->\n")
    assert found, title
    rows = [line.strip("|").split(" | ", 2) for line in after.split("\n\n")[0].splitlines()[2:]]
    return {case.strip(): (int(code), line.strip(" `").replace(r"\|", "|")) for case, code, line in rows}


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, the last line on standard error), the only one that is an error."""
    capsys.readouterr()
    code = main(arguments)
    lines = capsys.readouterr().err.rstrip().splitlines()
    assert sum(line.startswith("halfbyte: ") for line in lines) == 1, lines
    assert lines[-1].startswith("halfbyte: "), lines
    assert "Traceback" not in "".join(lines)
    return code, lines[-1].removeprefix("halfbyte: ")


def check(
    title: str, case: str, arguments: list[str], place: Path, capsys: pytest.CaptureFixture[str],
    leaves: Collection[str] = (),
) -> None:  # fmt: skip
    """The command answers as the page says, and leaves no output; of a run that had begun, `leaves` and its log."""
    code, line = said([each.replace("PLACE", str(place)) for each in arguments], capsys)
    line = line.replace(f"{place}/", "").replace(str(place), ".")
    row = f"| {case} | {code} | `{line.replace('|', chr(92) + '|')}` |"
    expected_code, text = promised(title).get(case, (0, ""))
    pattern = ".+?".join(map(re.escape, text.split("…")))
    assert code == expected_code, f"docs/refusals.md, {title}, promises otherwise: {row}"
    assert re.fullmatch(pattern, line), f"docs/refusals.md, {title}, promises otherwise: {row}"
    left = {path.name for path in (place / "out").glob("*")}
    assert left - {"metrics.jsonl"} == set(leaves) - {"metrics.jsonl"}


# -- base models ------------------------------------------------------------------------------------------------------


def tensors(**changed: torch.Tensor | None) -> Change:
    """The weights with some changed; None: removed."""
    names = {
        "q": Q, "embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "more": "model.more.weight",
        "head": "lm_head.weight",
    }  # fmt: skip

    def change(place: Path) -> None:
        state = load_file(place / "model" / WEIGHTS)
        for name, value in changed.items():
            state.pop(names[name], None)
            if value is not None:
                state[names[name]] = value
        save_file(state, place / "model" / WEIGHTS, metadata={"format": "pt"})

    return change


def config(**changed: Any) -> Change:
    """config.json with some values changed."""

    def change(place: Path) -> None:
        path = place / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def entry(start: Any, end: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    """A tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def header(value: Mapping[str, Any] | bytes, *, length: int | None = None, body: int = 32) -> Change:
    """A weights' file of this header and `body` bytes; `length` instead of the header's own."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    raw = (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(body)
    return lambda place: (place / "model" / WEIGHTS).write_bytes(raw)


def index(change: Callable[[dict[str, Any], Path], object]) -> Change:
    """The weights in two files with an index, which `change` is then given, with the folder."""

    def spoil(place: Path) -> None:
        folder = place / "model"
        state = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(state)
        halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: state[name] for name in part}, folder / file)
        os.mkfifo(place / "outside.safetensors")  # who opens it waits for ever
        value = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
        change(value, folder)
        (folder / INDEX).write_text(json.dumps(value))

    return spoil


def cut(name: str, count: int) -> Change:
    """`count` bytes less at the end."""
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:-count])


def pickled(place: Path) -> None:
    """A pickle that leaves a mark when it is read."""
    (place / "model" / WEIGHTS).unlink()
    payload = f"cos\nsystem\n(S'touch {place / 'ran'}'\ntR."
    (place / "model" / "pytorch_model.bin").write_bytes(payload.encode())


# -- data -------------------------------------------------------------------------------------------------------------


def data(*lines: str | bytes) -> Change:
    """A data file of these lines."""
    raw = b"\n".join(line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line for line in lines)
    return lambda place: (place / "data.jsonl").write_bytes(raw)


def chat(*turns: tuple[str, Any]) -> str:
    """A line of such turns, each (role, content)."""
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


def tokenizer(**changed: Any) -> Change:
    """tokenizer_config.json with some values changed; None: removed."""

    def change(place: Path) -> None:
        path = place / "model" / "tokenizer_config.json"
        values = json.loads(path.read_text()) | changed
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapter_config(**changed: Any) -> Change:
    """adapter_config.json changed by a person: the manifest goes, as a message elsewhere advises."""

    def change(place: Path) -> None:
        path = place / "adapter" / "adapter_config.json"
        values = json.loads(path.read_text()) | changed
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
        (place / "adapter" / "manifest.json").unlink()

    return change


def adapter_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """The adapter's tensors changed."""

    def spoil(place: Path) -> None:
        path = place / "adapter" / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)
        (place / "adapter" / "manifest.json").unlink()

    return spoil
