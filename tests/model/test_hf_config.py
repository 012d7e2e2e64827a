"""HalfbyteConfig: what it accepts, what it writes, and the ways from a saved folder back into our layers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from halfbyte.errors import ConfigError, ModelError
from halfbyte.model import hf_config, hf_quantizer
from halfbyte.model.hf_config import HalfbyteConfig, prequantized_config
from halfbyte.nn import Linear4bit


def test_the_usual_call_needs_no_change() -> None:
    kwargs = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": torch.uint8,
        "llm_int8_skip_modules": ["lm_head"],
    }  # fmt: skip
    assert HalfbyteConfig(**kwargs).to_dict() == BitsAndBytesConfig(**kwargs).to_dict()


def test_defaults_are_nf4_with_double_quantization_and_are_written_out() -> None:
    written = HalfbyteConfig().to_dict()
    assert written == BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ).to_dict()  # fmt: skip
    assert HalfbyteConfig.from_dict(written).to_dict() == written
    assert HalfbyteConfig.from_dict(written, return_unused_kwargs=True)[1] == {}
    json.dumps(written)


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16", "torch.float16", torch.float32])
def test_compute_dtype_by_dtype_or_name(dtype: Any) -> None:
    expected = None if dtype in (None, "auto") else getattr(torch, str(dtype).removeprefix("torch."))
    assert HalfbyteConfig(bnb_4bit_compute_dtype=dtype).bnb_4bit_compute_dtype == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"load_in_8bit": True}, "load_in_8bit: True asks for LLM.*int8.*BitsAndBytesConfig"),
        ({"llm_int8_threshold": 3.0}, "llm_int8_threshold"),
        ({"load_in_4bit": False}, "Leave quantization_config out"),
        ({"bnb_4bit_quant_typ": "nf4"}, "Did you mean bnb_4bit_quant_type"),
        ({"zzz": 1}, "It has load_in_4bit"),
        ({"bnb_4bit_quant_type": "int5"}, "nf4, fp4, int4"),
        ({"bnb_4bit_use_double_quant": "yes"}, "True, False"),
        ({"bnb_4bit_compute_dtype": "float64"}, "float32, bfloat16, float16"),
        ({"bnb_4bit_quant_storage": torch.bfloat16}, "uint8"),
        ({"blocksize": 100}, "32, 64"),
        ({"llm_int8_skip_modules": "lm_head"}, "list of module names"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HalfbyteConfig(**kwargs)
    HalfbyteConfig(load_in_8bit=False, llm_int8_threshold=6.0)  # bitsandbytes' 8-bit defaults mean nothing


def test_importing_the_config_registers_both_halves_once() -> None:
    code = (
        "from halfbyte.model.hf_config import HalfbyteConfig; from transformers.quantizers import auto;"
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['halfbyte'] is HalfbyteConfig;"
        "assert auto.AUTO_QUANTIZER_MAPPING['halfbyte'].__name__ == 'HalfbyteHfQuantizer';"
        "import sys; assert 'bitsandbytes' not in sys.modules and 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before = AUTO_QUANTIZATION_CONFIG_MAPPING["halfbyte"], AUTO_QUANTIZER_MAPPING["halfbyte"]
    config, quantizer = hf_config.__dict__.copy(), hf_quantizer.__dict__.copy()
    try:
        importlib.reload(hf_quantizer)
        importlib.reload(hf_config)
        assert (AUTO_QUANTIZATION_CONFIG_MAPPING["halfbyte"], AUTO_QUANTIZER_MAPPING["halfbyte"]) == before
    finally:  # other tests hold the classes of the first import
        hf_config.__dict__.update(config)
        hf_quantizer.__dict__.update(quantizer)


# -- the ways back from a saved folder --------------------------------------------------------------------------


@pytest.fixture
def folder(llama: Any, tmp_path: Path) -> Path:
    llama.load(quantization_config=HalfbyteConfig()).save_pretrained(tmp_path)
    return tmp_path


def test_transformers_never_gives_another_librarys_layers_for_our_config(llama: Any, folder: Path) -> None:
    """A class mismatch is an error of transformers, which names both; `config=` is the way in."""
    with pytest.raises(ValueError, match="BitsAndBytesConfig but you are passing a HalfbyteConfig"):
        llama.case.load(folder, quantization_config=HalfbyteConfig())
    model = llama.case.load(folder, config=prequantized_config(folder))
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)
    assert type(model.config.quantization_config).__name__ == "HalfbyteConfig"


@pytest.mark.parametrize(("wish", "expected"), [(None, None), ("bfloat16", torch.bfloat16), ("auto", None)])
def test_compute_dtype_can_be_given_when_reloading(llama: Any, folder: Path, wish: Any, expected: Any) -> None:
    model = llama.case.load(folder, config=prequantized_config(folder, compute_dtype=wish))
    assert model.model.layers[0].self_attn.q_proj.compute_dtype == expected


def test_a_stored_compute_dtype_other_than_the_models_is_kept(llama: Any, tmp_path: Path) -> None:
    llama.load(quantization_config=HalfbyteConfig(bnb_4bit_compute_dtype="bfloat16")).save_pretrained(tmp_path)
    model = llama.case.load(tmp_path, config=prequantized_config(tmp_path))
    assert model.model.layers[0].self_attn.q_proj.compute_dtype == torch.bfloat16


def test_other_folders_are_refused(llama: Any, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"is not quantized\. Pass quantization_config=HalfbyteConfig\(\)"):
        prequantized_config(llama.folder)
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match="is quantized as gptq"):
        prequantized_config(folder)


def test_one_config_can_load_several_models(llama: Any) -> None:
    config = HalfbyteConfig()
    llama.load(quantization_config=config)
    assert config.llm_int8_skip_modules is None
