"""A base in any format: planned to the byte, and trained to the same bits wherever it lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.config import QuantConfig, RunConfig
from halfbyte.model.inventory import LINEARS
from halfbyte.model.load import load_model
from halfbyte.model.quantize import quantize_model
from halfbyte.plan.base import read_base
from halfbyte.train import train

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


@pytest.mark.parametrize("quant_type", ["int4", "int8", "nf3"])
def test_stored_streamed_and_resumed(
    quant_type: str, make_llama: Callable[..., Path], make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    plain, quant = make_llama(num_hidden_layers=4), QuantConfig(quant_type=quant_type)  # type: ignore[arg-type]
    made = quantize_model(str(plain), tmp_path / "model", quant)
    loaded = load_model(made.output, QuantConfig(), compute_dtype=torch.float32)
    held = sum(row.bytes for row in loaded.inventory.rows if row.group == LINEARS)
    for path in (str(plain), made.output):
        assert read_base(path, quant, "float32").linears == held
    assert loaded.quant == {key: value for key, value in quant.recipe.items() if key != "scale"}
    settings = {"model__path": made.output, "train__save_every": 2, "train__keep": 9}
    whole = train(make_run("whole", **settings))
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    for name, more in (("streamed", {"memory__weights": "stream"}), ("resumed", {"train__resume": checkpoint})):
        again = train(make_run(name, **settings, **more))
        first, second = (load_file(Path(run.adapter) / "adapter_model.safetensors") for run in (whole, again))
        assert all(torch.equal(first[key], second[key]) for key in first)
