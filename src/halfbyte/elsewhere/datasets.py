"""Where the other tools' data lies, as the one file of JSON lines that halfbyte reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.elsewhere.rules import Outcome

READ = (".jsonl", ".ndjson", ".parquet")
"""What files that halfbyte reads end in."""


def file_of(path: str) -> tuple[str, str]:
    """The file of a path or hub id that halfbyte reads, and how to get it where there is none yet."""
    if path.endswith(READ):
        return path, ""
    if path.endswith(".json"):
        lines = path.removesuffix(".json") + ".jsonl"
        return lines, f"a list of records becomes JSON lines with: jq -c .[] {path} > {lines}"
    lines = path.strip("/").replace("/", "-") + ".jsonl"
    return lines, (
        f"a hub dataset becomes JSON lines with: python -c \"import datasets; datasets.load_dataset('{path}', "
        f"split='train').to_json('{lines}')\""
    )


def as_one(paths: Sequence[str], settings: dict[str, Any], *notes: str, key: str = "data.train") -> Outcome:
    """`settings` and the file that `paths` become."""
    files = [file_of(path) for path in paths]
    told = [*notes, *(how for _, how in files if how)]
    name = files[0][0]
    if len(files) > 1:
        name = "train.jsonl" if key == "data.train" else "held_out.jsonl"
        told.append(f"one file of one format: cat {' '.join(file for file, _ in files)} > {name}")
    return Outcome(settings={key: name} | settings, differs="; ".join(told))


def share_held_out(value: Any, _: Any) -> Outcome:
    """A share or a number of samples to hold out."""
    if not value:
        return Outcome()
    much = f"{value:.3g} of the lines" if isinstance(value, float) and value < 1 else f"{value} lines"
    return Outcome(missing=f"data.eval names a file: put {much} into one of their own")
