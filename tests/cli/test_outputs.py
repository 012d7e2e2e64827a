"""What commands write: nothing is overwritten, and no folder is made on the way to an output."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.cli.main import main

MODEL = ["--model", "PLACE/model"]
OUTPUTS = {
    "demo": ["demo", "--output"],
    "train": ["train", *MODEL, "--data", "PLACE/data.jsonl", "--output"],
    "compare": ["compare", *MODEL, "--data", "PLACE/data.jsonl", "--eval-data", "PLACE/data.jsonl", "--output"],
    "quantize": ["quantize", *MODEL, "--output"],
    "merge": ["merge", *MODEL, "--adapter", "PLACE/adapter", "--output"],
    "init": ["init", *MODEL, "--output"],
    "import-config": ["import-config", "PLACE/theirs.yaml", "--output"],
    "plan --picture": ["plan", *MODEL, "--picture"],
    "quantize --report": ["quantize", *MODEL, "--output", "PLACE/out", "--report"],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_missing_folder_is_not_made(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "theirs.yaml").write_text("base_model: m\nadapter: qlora\n")
    path = place / "no" / "such" / "out.html"
    arguments = [each.replace("PLACE", str(place)) for each in OUTPUTS[name]]
    assert main([*arguments, str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"halfbyte: {path}: there is no folder {path.parent} to put it in. Make that folder first."
    assert not (place / "no").exists()
    assert not (place / "out").exists()


def test_quantize_overwrites_no_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", "--model", str(place / "model"), "--output", str(place / "out")]
    assert main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in (place / "out").iterdir()}
    capsys.readouterr()
    assert main([*command, "--quant-type", "fp4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"halfbyte: {place}/out: is there already. Give another --output, or move this one away."
    assert {path: path.stat().st_mtime_ns for path in (place / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("bits", "raised"), [("9", "14 in int8: nothing is left to raise"), ("8", r"\d+ in int8, \d+ in nf4")]
)
def test_quantize_says_where_a_budget_goes(
    bits: str, raised: str, make_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "quantize",
        "--model",
        str(make_llama()),
        "--output",
        str(tmp_path / "out"),
        "--set",
        f"quant.bits={bits}",
    ]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"14 layers at [\d.]+ bits per weight \({raised}\)", said), said
