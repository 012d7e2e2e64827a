"""Batches through transformers: what a sequence begins with is computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.config import QuantConfig
from halfbyte.kernels.batch_step import BLOCK, Row
from halfbyte.model import load_model
from halfbyte.model.plain_batch import PlainBatch


def test_a_cache_is_cut_back(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_llama, QuantConfig(), compute_dtype=torch.float32).model
    batch = PlainBatch(model, positions=256, context=128)
    blocks = torch.arange(4, dtype=torch.int32)
    given: list[int] = []
    model.register_forward_pre_hook(lambda _, a, k: given.append(k["input_ids"].shape[1]), with_kwargs=True)

    def run(ids: list[int], start: int) -> torch.Tensor:
        rows = [Row(start + at, blocks, None) for at in range(len(ids))]
        return batch.run(ids, rows, [len(ids) - 1])

    first = list(range(3, 3 + 2 * BLOCK))
    run(first, 0)
    found = run([7, 8, 9], BLOCK)  # another turn after the first block
    assert given == [2 * BLOCK, 3]
    expected = model(input_ids=torch.tensor([[*first[:BLOCK], 7, 8, 9]])).logits[0, -1].float()
    assert float((found[0] - expected).abs().max()) < 1e-4 * float(expected.abs().max())  # measured 1e-6
