"""Damaged and hostile files are refused in one line, and never crash, hang, or take memory for what they claim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAULTS = Path(__file__).parent / "faults"
NAMES = (
    "safetensors", "index", "adapter weights", "adapter config", "adapter info", "jsonl", "gguf", "config.json",
    "toml",
)  # fmt: skip
QUICK, MANY = 150, 3000
STRICTER = ()
"""Where halfbyte refuses what the safetensors library reads, by the beginning of its words."""


def run(name: str, count: int, seed: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, FAULTS / "fuzz.py", name, str(count), str(seed)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(FAULTS.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(("count", "seed"), [(QUICK, 0), pytest.param(MANY, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.timeout(900)
def test_changed_files(name: str, count: int, seed: int, record_property: Callable[[str, object], None]) -> None:
    result = run(name, count, seed)
    record_property("files", count)
    record_property("refused", result.get("refused", 0))
    assert result.get("refused", 0) > count // 20
    others = {reason: number for reason, number in result["differ"].items() if not reason.startswith(STRICTER)}
    assert not others


@pytest.mark.parametrize(("count", "seed"), [(140, 0), pytest.param(1400, 1, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_every_flipped_bit_of_a_checkpoint(
    count: int, seed: int, record_property: Callable[[str, object], None]
) -> None:
    result = run("bit flips", count, seed)
    record_property("flips", count)
    record_property("found", result["found"])
    record_property("without effect", result["without effect"])
    assert result["without effect"] < count // 50  # blanks of the manifest
