"""A base in any format: planned to the byte, and trained to the same bits wherever it lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from halfbyte.config import QuantConfig, RunConfig
from halfbyte.errors import ConfigError
from halfbyte.model.hf_config import prequantized_config
from halfbyte.model.inventory import LINEARS
from halfbyte.model.load import load_model
from halfbyte.model.quantize import quantize_model
from halfbyte.nn import Linear4bit
from halfbyte.plan.base import read_base
from halfbyte.train import train

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


@pytest.mark.parametrize(
    "quant",
    [*(QuantConfig(quant_type=name) for name in ("int4-asym", "int8", "nf3")), QuantConfig(bits=5.0)],
    ids=["int4-asym", "int8", "nf3", "5 bits"],
)  # fmt: skip
def test_stored_streamed_and_resumed(
    quant: QuantConfig, make_llama: Callable[..., Path], make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    plain = make_llama(num_hidden_layers=4)
    made = quantize_model(str(plain), tmp_path / "model", quant)
    loaded = load_model(made.output, QuantConfig(), compute_dtype=torch.float32)
    rows = [row for row in loaded.inventory.rows if row.group == LINEARS]
    for path in (made.output, *([] if quant.bits else [str(plain)])):
        assert read_base(path, quant, "float32").linears == sum(row.bytes for row in rows)
    assert loaded.quant == quant.recipe
    if quant.bits:
        assert {row.dtype for row in rows} == {"nf4", "int8"}
        assert 4.7 < made.bits_per_weight <= 5
        theirs = AutoModelForCausalLM.from_pretrained(made.output, config=prequantized_config(made.output))
        for name, kind in made.formats.items():
            ours, other = loaded.model.get_submodule(name), theirs.get_submodule(name)
            assert isinstance(ours, Linear4bit)
            assert isinstance(other, Linear4bit)
            assert ours.quant_type == other.quant_type == kind
            assert torch.equal(ours.dequantize(), other.dequantize())
    with pytest.raises(ConfigError, match=r"quant\.bits: is chosen once.*halfbyte quantize --model"):
        load_model(str(plain), QuantConfig(bits=5.0), compute_dtype=torch.float32)
    settings = {"model__path": made.output, "train__save_every": 2, "train__keep": 9, "train__steps": 4}
    whole = train(make_run("whole", **settings))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    for name, more in (("streamed", {"memory__weights": "stream"}), ("resumed", {"train__resume": checkpoint})):
        again = train(make_run(name, **settings, **more))
        first, second = (load_file(Path(run.adapter) / "adapter_model.safetensors") for run in (whole, again))
        assert all(torch.equal(first[key], second[key]) for key in first)
