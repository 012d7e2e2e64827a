"""Embeddings and head in int8: the model that the decoded tables give, wherever its layers live."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from halfbyte.config import QuantConfig
from halfbyte.errors import ConfigError, ModelError
from halfbyte.model.decode import Decoder
from halfbyte.model.int8 import int8_names
from halfbyte.model.load import LoadedModel, load_model, skeleton
from halfbyte.model.placement import Placement
from halfbyte.model.quantize import quantize_model
from halfbyte.model.source import open_source
from halfbyte.nn import FrozenLinear, chunked_cross_entropy
from halfbyte.quant.int8 import dequantize_int8, quantize_int8

MakeLlama = Callable[..., Path]
IDS = torch.arange(3, 43).view(2, 20)


def load(folder: Path, embeddings: str, **how: Any) -> LoadedModel:
    how = {"compute_dtype": torch.float32} | how
    return load_model(str(folder), QuantConfig(embeddings=embeddings, blocksize=32), **how)  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def with_decoded_tables(loaded: LoadedModel) -> nn.Module:
    """A model as stored, given the tables that int8 stands for: rows in the dtype of the file, the head in float32."""
    model = loaded.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    (rows, rows_scales), (codes, scales) = (quantize_int8(module.weight) for module in (embedding, head))
    dtype = embedding.weight.dtype
    embedding.weight = nn.Parameter(dequantize_int8(rows, rows_scales, dtype), requires_grad=False)
    weight = nn.Parameter(dequantize_int8(codes, scales, torch.float32), requires_grad=False)
    model.set_output_embeddings(FrozenLinear(weight, head.bias))
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_decoded_tables(make_llama: MakeLlama, tied: bool, dtype: torch.dtype) -> None:
    folder = make_llama(dtype=dtype, tie_word_embeddings=tied, hidden_size=96)
    as_stored, loaded = load(folder, "as_stored"), load(folder, "int8")
    assert loaded.base_sha256 == as_stored.base_sha256
    embedding, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    assert embedding.weight.dtype == head.weight.dtype == torch.int8
    assert (head.weight is embedding.weight) is tied
    plain = logits(as_stored.model)
    found, expected = logits(loaded.model), logits(with_decoded_tables(as_stored))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # sums in another order, as in test_load.py
    assert 1e-3 < float((found - plain).norm() / plain.norm()) < 0.03  # measured: 0.9 to 1.1 %
    assert not loaded.inventory.unquantized


def test_token_by_token(make_llama: MakeLlama) -> None:
    """The native step against transformers' own forward over the same int8 (its bound is in decode.py)."""
    for tied in (True, False):
        loaded = load(make_llama(tie_word_embeddings=tied, hidden_size=96, head_dim=32), "int8")
        Decoder(loaded.model).try_out([5, 6, 7])


def test_the_loss_has_its_gradient(tiny_llama: Path) -> None:
    head = load(tiny_llama, "int8").model.get_output_embeddings()
    hidden = torch.randn(2, 9, 64, requires_grad=True)
    labels = torch.randint(0, 100, (2, 9))
    loss, count = chunked_cross_entropy(hidden, labels, head, head.weight.shape[0])
    weight = dequantize_int8(head.weight, head.scales, torch.float32)
    scores = (hidden[:, :-1] @ weight.t()).flatten(0, 1)
    expected = nn.functional.cross_entropy(scores, labels[:, 1:].flatten(), reduction="sum")
    assert count == 16
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(each, hidden)[0] for each in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_streamed_and_mapped_are_the_same(make_llama: MakeLlama, tmp_path: Path, tied: bool) -> None:
    """Rows that are read one by one take the values they have in int8."""
    quantize_model(str(make_llama(tie_word_embeddings=tied)), tmp_path / "model", QuantConfig())
    resident = logits(load(tmp_path / "model", "int8").model)
    for weights in ("stream", "mmap"):
        loaded = load(tmp_path / "model", "int8", placement=Placement(weights=weights))
        assert torch.equal(logits(loaded.model), resident)
        assert loaded.model.get_output_embeddings().weight.dtype == torch.int8


def test_an_embedding_that_scales_its_rows(tmp_path: Path) -> None:
    """Gemma's; its padding token lies beyond the rows of any batch."""
    torch.manual_seed(0)
    config = hf.Gemma3TextConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, pad_token_id=99, eos_token_id=98, bos_token_id=97,
    )  # fmt: skip
    hf.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    loaded, expected = load(tmp_path, "int8"), with_decoded_tables(load(tmp_path, "as_stored"))
    torch.testing.assert_close(logits(loaded.model), logits(expected), rtol=0, atol=2e-5)


def test_broken_numbers_and_writing_are_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(make_llama())
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lm_head\.weight: has 1 NaN or Inf"):
        load(tmp_path, "int8")
    with pytest.raises(ConfigError, match=r"quant\.embeddings: 'int8' is not written"):
        quantize_model(str(tmp_path), tmp_path / "four", QuantConfig(embeddings="int8"))
    assert not (tmp_path / "four").exists()


def test_other_heads_are_refused(tiny_llama: Path) -> None:
    model = skeleton(open_source(str(tiny_llama)))
    assert int8_names(model, QuantConfig(embeddings="int8")) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not int8_names(model, QuantConfig())
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    with pytest.raises(ConfigError, match="a Sequential as output head"):
        int8_names(model, QuantConfig(embeddings="int8"))
