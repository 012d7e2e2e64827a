"""Where the optimizer's moments live changes nothing, and may change on resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.config import RunConfig
from halfbyte.errors import ResourceError
from halfbyte.train import train
from halfbyte.train.observer import Observer

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


PAGED = {"optim__paged": True, "memory__optimizer_budget": "40kB"}
"""A tenth of what these adapters need."""


class Notes(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_paged_runs_equal_unpaged_ones_and_resume_each_other(make_run: Callable[..., RunConfig]) -> None:
    expected = load_file(Path(train(make_run("plain", train__save_every=3)).adapter) / "adapter_model.safetensors")
    notes = Notes()
    runs: list[tuple[str, dict[str, Any]]] = [
        ("paged", {**PAGED, "train__save_every": 3}),
        ("to-paged", {**PAGED, "train__resume": "plain/checkpoint-3"}),
        ("to-plain", {"train__resume": "paged/checkpoint-3"}),
    ]
    for name, settings in runs:
        config = make_run(name)
        output = Path(config.train.output)
        if "train__resume" in settings:
            settings["train__resume"] = str(output.parent / settings["train__resume"])
        result = train(make_run(name, **settings), observer=notes)
        adapter = load_file(Path(result.adapter) / "adapter_model.safetensors")
        assert all(torch.equal(adapter[key], value) for key, value in expected.items()), name
    for kind in ("optimizer", "adapter_model"):
        one, other = (
            load_file(output.parent / run / f"checkpoint-6/{kind}.safetensors") for run in ("plain", "paged")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    said = [line for line in notes.lines if line.startswith("optimizer states: ")]
    assert len(said) == 2
    assert "in pages of 4.1 kB: 36.9 kB in memory, " in said[0]


def test_a_folder_that_is_not_there_stops_the_run_before_it_begins(make_run: Callable[..., RunConfig]) -> None:
    config = make_run(**PAGED, memory__offload_dir="/nowhere/at/all")
    with pytest.raises(ResourceError, match="/nowhere/at/all: cannot be written: No such file"):
        train(config)
    assert not (Path(config.train.output) / "metrics.jsonl").exists()
