"""Checkpoints of every released format go on, to the losses that were recorded with them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from halfbyte.checkpoint.manifest import FORMAT_VERSION
from halfbyte.config import load_config
from halfbyte.train import Observer, train

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
GOLDEN = Path(__file__).parent.parent / "golden"


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_there_is_one_for_every_format() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"format-{n}" for n in range(1, FORMAT_VERSION + 1)}


@pytest.mark.parametrize("name", sorted(os.listdir(GOLDEN)))
def test_it_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2e-5 of the loss: others add in another order (measured: 0 from AVX-512 to AVX2, 2e-7 to plain torch)."""
    place = shutil.copytree(GOLDEN / name, tmp_path / name)
    monkeypatch.chdir(place)
    observer = Notes()
    train(load_config(
        model__path="model", data__train="data.jsonl", train__output="run", train__steps=6, train__save_every=2,
        lora__r=1, lora__dropout=0.1, data__max_seq_len=96, quant__compute_dtype="float32", optim__lr=0.01,
    ), observer=observer)  # fmt: skip
    assert any("resumed from run/checkpoint-2 after step 2" in note for note in observer.notes)
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    recorded = {int(step): loss for step, loss in json.loads((place / "losses.json").read_text()).items()}
    assert losses == {step: pytest.approx(recorded[step], rel=2e-5) for step in (3, 4, 5, 6)}
