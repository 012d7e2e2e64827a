"""Folders in codebooks that bitsandbytes does not have: ours opens them, whoever does not know them refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.config import QuantConfig
from halfbyte.model.hf_config import HalfbyteConfig, prequantized_config
from halfbyte.model.load import load_model
from halfbyte.model.quantize import quantize_model
from halfbyte.nn import Linear4bit

OPEN = "import sys; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: layer.dequantize() for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


@pytest.mark.parametrize("quant_type", ["int4", "int4-asym", "bof4-s"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_what_we_save_we_open(llama: Any, tmp_path: Path, quant_type: str, double_quant: bool) -> None:
    config = HalfbyteConfig(bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant, blocksize=32)
    ours = llama.load(quantization_config=config)
    ours.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"quant_method": "halfbyte"' in text
    assert not any(word in text for word in ("bitsandbytes", "nf4", "load_in_4bit", "bnb"))
    for found in (llama.case.load(tmp_path), llama.case.load(tmp_path, config=prequantized_config(tmp_path))):
        assert weights(found).keys() == weights(ours).keys()
        assert all(torch.equal(weight, weights(ours)[name]) for name, weight in weights(found).items())
        assert {m.quant_type for m in found.modules() if isinstance(m, Linear4bit)} == {quant_type}
        with torch.no_grad():
            assert torch.equal(found(**llama.batch()).logits, ours(**llama.batch()).logits)


@pytest.mark.parametrize("quant_type", ["int4", "int4-asym"])
def test_without_halfbyte_a_folder_is_refused_whatever_its_config_says(
    tiny_llama: Path, tmp_path: Path, quant_type: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantize_model(str(tiny_llama), tmp_path / quant_type, QuantConfig(quant_type=quant_type))
    loaded = load_model(str(tmp_path / quant_type), QuantConfig(), compute_dtype=torch.float32)
    expected = {"quant_type": quant_type, "double_quant": True, "blocksize": 64, "scale": "mse-signed"}
    assert loaded.quant == expected
    file = tmp_path / quant_type / "config.json"
    config = json.loads(file.read_text())
    forged = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True).to_dict()
    run = subprocess.run(
        [sys.executable, "-c", OPEN, str(file.parent)], capture_output=True, text=True, check=False,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning"},  # the commands set it to error, in tests for all
    )  # fmt: skip
    assert run.returncode == 1
    assert "Unknown quantization type, got halfbyte" in run.stderr
    assert "ignore_mismatched_sizes" in run.stderr  # shapes that do not fit
    file.write_text(json.dumps(config | {"quantization_config": forged}))
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        AutoModelForCausalLM.from_pretrained(file.parent)
