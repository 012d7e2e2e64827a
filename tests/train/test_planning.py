"""A run that cannot keep to its budget is refused before its base is loaded; the plan is part of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import BatchLoader
from halfbyte.errors import ResourceError
from halfbyte.model.source import load_tokenizer
from halfbyte.plan import plan
from halfbyte.train import setup, train
from halfbyte.train.objective import Objective
from halfbyte.train.observer import Observer
from halfbyte.train.setup import load_data

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

MakeRun = Any


def test_too_small_a_budget_is_refused_before_the_base_is_loaded(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(setup, "load_model", never)
    with pytest.raises(ResourceError, match=r"needed at least.*--memory \d+MB") as refused:
        train(make_run(memory__budget="50MB"))
    assert refused.value.exit_code == 4
    assert refused.value.where == "memory.budget"
    assert not Path(make_run().train.output).exists()


def test_a_path_is_not_a_run(tiny_llama: Path) -> None:
    for function in (plan, train):
        with pytest.raises(TypeError, match=r"a RunConfig is needed, not .*load_config\(model__path"):
            function(str(tiny_llama))


def test_the_prediction_is_part_of_the_result(make_run: MakeRun) -> None:
    result = train(make_run(train__steps=1))
    assert 0 < result.predicted_peak_memory < 4e9


def test_the_worst_batch_is_the_largest_of_those_that_will_run(make_run: MakeRun) -> None:
    config = make_run(data__max_seq_len=96)
    data = load_data(config.data.train, load_tokenizer(config.model.path), config.data)
    loader = BatchLoader(data, micro_batch_size=2, packing=True, max_seq_len=96, seed=0)
    for count in (1, 3, loader.batches_per_epoch() + 2):
        batches, cursor = [], loader.start()
        for _ in range(count):
            batch, cursor = loader.next_batch(cursor)
            batches.append(batch)
        worst = loader.worst(count)
        assert worst.tokens == max(batch.num_tokens for batch in batches)
        assert worst.targets == max(batch.num_targets for batch in batches)
        assert sum(data.lengths[list(worst.samples)]) == worst.tokens


def test_a_model_that_turns_out_not_to_be_fused_is_planned_again(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers then keep more: what does not fit is refused before a step is taken."""
    fused = setup.prepare(make_run(), Observer())
    assert fused.plan.notes == ()
    monkeypatch.setattr(Objective, "fused", False)
    plain = setup.prepare(make_run(), Observer())
    assert plain.plan.peak_memory > fused.plan.peak_memory
    assert any("transformers wrote it" in note for note in plain.plan.notes)


def test_dropout_is_planned_as_plain_layers(make_run: MakeRun) -> None:
    config = make_run(lora__dropout=0.1)
    assert any("transformers wrote it" in note for note in plan(config).notes)
