"""Ranks of one machine share a budget, and a base that is stored in 4 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.config import QuantConfig, load_config
from halfbyte.model.quantize import quantize_model
from halfbyte.plan import Budget, Machine, of_rank, plan

MACHINE = Machine(runtime=400_000_000)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "base"
    quantize_model(str(tiny_llama), folder, QuantConfig())
    return folder


def test_a_stored_base_counts_once(stored: Path, tiny_llama: Path) -> None:
    config = load_config(model__path=str(stored), train__output="run")
    one, two = (plan(config, machine=replace(MACHINE, ranks=ranks)) for ranks in (1, 2))
    assert (one.shared, one.machine_peak) == (0, one.peak_memory)
    base = sum(one.terms[name] for name in ("linears_4bit", "embeddings", "head"))
    assert two.shared == base
    assert two.peak_memory == one.peak_memory
    assert two.machine_peak == 2 * one.peak_memory - base
    own = plan(load_config(model__path=str(tiny_llama), train__output="run"), machine=replace(MACHINE, ranks=2))
    assert own.shared == 0
    assert own.machine_peak == 2 * own.peak_memory
    assert any("holds a copy of the base" in note for note in own.notes)


def test_the_budget_is_the_machines(stored: Path) -> None:
    config = load_config(model__path=str(stored), train__output="run", memory__budget="700MB")
    assert plan(config, machine=MACHINE).fits
    both = plan(config, machine=replace(MACHINE, ranks=2))
    assert not both.fits
    enough = replace(config, memory=replace(config.memory, budget=str(both.smallest_memory)))
    assert plan(enough, machine=replace(MACHINE, ranks=2)).fits


def test_a_ranks_part() -> None:
    """So much that all together reach the budget: 2 x 6 - 2 = 10."""
    assert of_rank(Budget(10, "memory.budget"), 2, 2) == Budget(6, "memory.budget, shared by 2 ranks")
    assert of_rank(Budget(10, "memory.budget"), 1, 0) == Budget(10, "memory.budget")
