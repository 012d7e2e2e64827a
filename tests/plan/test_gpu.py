"""Plans for a GPU, on a machine without one: sizes from configs alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import RunConfig, load_config
from halfbyte.plan import Machine, plan
from halfbyte.plan.base import read_base
from halfbyte.plan.gpu import ALLOCATOR_LEAST, ALLOCATOR_SHARE, CONTEXT, FEW_ROWS, Gpu, find_gpu
from halfbyte.plan.layer import _product
from halfbyte.plan.ledger import Ledger
from halfbyte.plan.phases import sizes, speed_key

CARD = Gpu(name="a card", memory=24 * 10**9, capability=8)
MACHINE = Machine(threads=1, runtime=400_000_000, gpu=CARD)
LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def config(**settings: Any) -> RunConfig:
        return load_config(model__path=str(tmp_path), **settings)

    return config


def test_the_device_decides_what_is_planned(make: Any) -> None:
    auto, cpu = plan(make(), machine=MACHINE), plan(make(model__device="cpu"), machine=MACHINE)
    assert (auto.terms["runtime"], auto.budget) == (CONTEXT, CARD.memory)
    assert "a card" in auto.budget_source
    assert (cpu.terms["runtime"], cpu.budget) == (400_000_000, None)
    assert plan(make(), machine=replace(MACHINE, gpu=None)).terms == cpu.terms
    elsewhere = plan(make(model__device="cuda"), machine=replace(MACHINE, gpu=None))
    assert (elsewhere.terms, elsewhere.budget) == (auto.terms, None)
    assert any("the host's" in note for note in auto.notes)


def test_what_the_allocator_takes_is_planned(make: Any) -> None:
    terms = plan(make(), machine=MACHINE).terms
    tensors = sum(size for name, size in terms.items() if name not in ("runtime", "allocator"))
    assert terms["allocator"] == tensors // ALLOCATOR_SHARE + ALLOCATOR_LEAST
    assert "allocator" not in plan(make(model__device="cpu"), machine=MACHINE).terms


def test_the_host_budget_is_not_the_devices(make: Any) -> None:
    made = plan(make(memory__budget="8GB", memory__host_budget="1GB"), machine=MACHINE)
    assert (made.budget, made.fits) == (8 * 10**9, True)


def test_a_groups_weights_are_decoded_at_once(make: Any) -> None:
    """In 16 bits; not for a few rows, which are multiplied with the 4-bit bytes."""
    config = make()
    base = read_base(config.model.path, config.quant, "bfloat16")
    peaks = []
    for tokens in (FEW_ROWS, FEW_ROWS + 1):
        led = Ledger()
        _product(led, sizes(config, base, MACHINE, tokens), "gate_up")
        peaks.append(led.peak.total)
    u = 2 * 2 * 16  # of a token: both adapters' ranks in 16 bits
    assert peaks == [u * FEW_ROWS, u * (FEW_ROWS + 1) + 2 * 2 * 2048 * 8192]


def test_what_is_changed_to_fit(make: Any) -> None:
    config = make(train__micro_batch_size=8, data__max_seq_len=2048)
    roomy = plan(config, machine=MACHINE)
    tight = plan(make(train__micro_batch_size=8, data__max_seq_len=2048, memory__budget="4GB"), machine=MACHINE)
    assert (roomy.changes, tight.fits) == ((), True)
    assert tight.choices["micro_batch_size"] < 8
    assert tight.choices["weights"] == "resident", "of a config alone it is not known whether it is stored in 4 bits"
    assert not plan(make(memory__budget="1GB"), machine=MACHINE).fits


def test_speeds_are_of_a_device(make: Any) -> None:
    assert speed_key(make(), MACHINE) == "a card bfloat16"
    assert speed_key(make(model__device="cpu"), MACHINE) == "float32"
    old = replace(MACHINE, gpu=replace(CARD, capability=7))
    assert speed_key(make(), old) == "a card float32"


def test_looking_for_a_gpu_never_fails() -> None:
    found = find_gpu()
    assert found is None or found.memory > 0
