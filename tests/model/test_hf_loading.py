"""What loading promises: dtypes, the inventory, what is left alone and why, refusals, casts, compilation."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from halfbyte.errors import ModelError, ResourceError
from halfbyte.model.hf_config import HalfbyteConfig, prequantized_config
from halfbyte.model.inventory import inventory
from halfbyte.nn import Linear4bit


def layers(model: nn.Module) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def edit_weights(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the folder `source` with its tensors changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prequantized", [False, True])
def test_what_is_not_quantized_has_the_dtype_asked_for(
    llama: Any, tmp_path: Path, dtype: torch.dtype, prequantized: bool
) -> None:
    if prequantized:
        llama.load(quantization_config=HalfbyteConfig(), dtype=torch.bfloat16).save_pretrained(tmp_path)
        model = llama.case.load(tmp_path, config=prequantized_config(tmp_path), dtype=dtype)
    else:
        model = llama.load(quantization_config=HalfbyteConfig(), dtype=dtype)
    found = {p.dtype for n, p in model.named_parameters()}
    assert found == {dtype, torch.uint8}
    stored = torch.bfloat16 if prequantized else dtype
    assert {layer.weight_dtype for layer in layers(model).values()} == {stored}
    assert model(**llama.batch()).logits.dtype == dtype


def test_biases_have_the_dtype_asked_for(save_tiny: Any) -> None:
    model = save_tiny("qwen2").load(quantization_config=HalfbyteConfig(), dtype=torch.bfloat16)
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16


def test_casting_the_model_leaves_packed_bytes_alone(llama: Any) -> None:
    model = llama.load(quantization_config=HalfbyteConfig())
    before = {name: layer.weight.clone() for name, layer in layers(model).items()}
    for cast in (lambda: model.to(torch.bfloat16), lambda: nn.Module.half(model), lambda: model.model.layers.float()):
        cast()
        for name, layer in layers(model).items():
            assert torch.equal(layer.weight, before[name])
            assert layer.absmax.dtype == torch.uint8
            assert layer.nested_absmax is not None
            assert layer.nested_absmax.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nan_in_a_weight_is_refused_by_full_name_and_count(save_tiny: Any, tmp_path: Path, name: str) -> None:
    saved = save_tiny(name)
    keys = {"llama": "model.layers.1.mlp.up_proj.weight", "gpt2": "transformer.h.1.mlp.c_fc.weight"}

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        key = keys[name] if keys[name] in tensors else keys[name].removeprefix("transformer.")
        tensors[key][3, :2] = float("nan")
        tensors[key][4, 0] = float("inf")

    folder = edit_weights(saved.folder, tmp_path / "nan", spoil)
    with pytest.raises(ModelError, match=f"{keys[name]}: has 3 NaN or Inf"):
        saved.case.load(folder, quantization_config=HalfbyteConfig())


def test_a_layer_missing_from_the_checkpoint_is_new_and_stays_trainable(
    llama: Any, tmp_path: Path, caplog: Any
) -> None:
    key = "model.layers.0.mlp.up_proj"
    folder = edit_weights(llama.folder, tmp_path / "less", lambda tensors: tensors.pop(f"{key}.weight"))
    with caplog.at_level(logging.WARNING, "halfbyte"):
        model = llama.case.load(folder, quantization_config=HalfbyteConfig())
    layer = model.get_submodule(key)
    assert type(layer) is nn.Linear
    assert layer.weight.requires_grad
    assert 0.005 < layer.weight.std() < 0.05
    assert f"{key} is not in the checkpoint" in caplog.text
    model.save_pretrained(tmp_path / "saved")
    again = llama.case.load(tmp_path / "saved", config=prequantized_config(tmp_path / "saved"))
    assert torch.equal(again.get_submodule(key).weight, layer.weight)


def test_a_prequantized_folder_that_contradicts_its_config_is_refused(llama: Any, tmp_path: Path) -> None:
    llama.load(quantization_config=HalfbyteConfig()).save_pretrained(tmp_path / "good")
    key = "model.layers.0.self_attn.q_proj.weight"

    def keep_codes_only(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(key + ".")]:
            del tensors[name]

    def drop_absmax(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key + ".absmax"]

    for change, message in ((keep_codes_only, "is not stored quantized"), (drop_absmax, "has the keys")):
        folder = edit_weights(tmp_path / "good", tmp_path / change.__name__, change)
        with pytest.raises(ModelError, match=f"{key}: {message}"):
            llama.case.load(folder, config=prequantized_config(folder))


def test_a_device_map_that_offloads_is_refused(llama: Any) -> None:
    with pytest.raises(ResourceError, match="device_map"):
        llama.load(quantization_config=HalfbyteConfig(), device_map={"model": "cpu", "lm_head": "disk"})
    assert layers(llama.load(quantization_config=HalfbyteConfig(), device_map="cpu"))


# -- what is left alone -----------------------------------------------------------------------------------------


def test_skip_modules_and_the_head_are_left_and_written_for_other_readers(llama: Any, tmp_path: Path) -> None:
    model = llama.load(quantization_config=HalfbyteConfig(llm_int8_skip_modules=["down_proj"]))
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(model.lm_head) is nn.Linear
    model.save_pretrained(tmp_path)
    assert {"down_proj", "lm_head"} <= set(model.config.quantization_config.to_dict()["llm_int8_skip_modules"])
    again = llama.case.load(tmp_path, config=prequantized_config(tmp_path))
    assert layers(again).keys() == layers(model).keys()


def test_a_skip_module_that_names_nothing_is_said(llama: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "halfbyte"):
        llama.load(quantization_config=HalfbyteConfig(llm_int8_skip_modules=["lm_head", "down_prj"]))
    assert "llm_int8_skip_modules names no layer: down_prj" in caplog.text


def test_tied_heads_stay_tied(save_tiny: Any, tmp_path: Path) -> None:
    saved = save_tiny("qwen2")
    model = saved.load(quantization_config=HalfbyteConfig())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = saved.case.load(tmp_path, config=prequantized_config(tmp_path))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_classification_heads_are_left(save_tiny: Any) -> None:
    for name in ("bert", "vit"):
        model = save_tiny(name).load(quantization_config=HalfbyteConfig())
        assert type(model.classifier) is nn.Linear
        assert model.classifier.weight.requires_grad


def test_blocksize_and_codebook_reach_the_layers_and_survive_a_reload(llama: Any, tmp_path: Path) -> None:
    config = HalfbyteConfig(bnb_4bit_quant_type="fp4", blocksize=128, bnb_4bit_use_double_quant=False)
    model = llama.load(quantization_config=config)
    model.save_pretrained(tmp_path)
    again = llama.case.load(tmp_path, config=prequantized_config(tmp_path))
    for layer in [*layers(model).values(), *layers(again).values()]:
        assert (layer.quant_type, layer.blocksize, layer.nested_absmax) == ("fp4", 128, None)
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


# -- the inventory ----------------------------------------------------------------------------------------------


def test_the_inventory_counts_every_byte_once(save_tiny: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "halfbyte"):
        model = save_tiny("qwen2").load(quantization_config=HalfbyteConfig())
    found = model.hf_quantizer.inventory
    assert found == inventory(model)
    assert str(found) in caplog.text
    expected = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert found.bytes == expected
    rows = {(row.group, row.dtype): row for row in found.rows}
    assert rows["quantized linears", "nf4"].tensors == 14
    assert rows["quantized linears", "nf4"].parameters == sum(
        m.in_features * m.out_features for m in layers(model).values()
    )
    assert ("head", "float32") not in rows  # tied: counted with the embeddings
    assert rows["embeddings", "float32"].bytes == 128 * 64 * 4


def test_large_weights_that_are_not_quantized_are_listed_with_the_reason(llama: Any) -> None:
    model = llama.load(quantization_config=HalfbyteConfig(llm_int8_skip_modules=["down_proj"]))
    quantizer = model.hf_quantizer
    assert quantizer.inventory.unquantized == []  # none of this model's reaches 1 MB
    listed = {n: reason for n, _, reason in inventory(model, quantizer.reasons, large=1000).unquantized}
    assert listed["model.embed_tokens.weight"] == "embedding table"
    assert listed["lm_head.weight"] == "output head"
    assert listed["model.layers.0.mlp.down_proj.weight"] == "named in llm_int8_skip_modules"
    assert len(listed) == 4


def test_the_forward_compiles_to_one_graph(llama: Any) -> None:
    model = llama.load(quantization_config=HalfbyteConfig())
    ids = llama.batch()["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(lambda x: model(x, use_cache=False).logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_a_checkpoint_stores_fused_can_be_saved_and_reloaded(tmp_path: Path) -> None:
    """DINOv2's files hold gate and up as one tensor, which transformers splits on load and would join on save."""
    config = hf.Dinov2Config(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8, use_swiglu_ffn=True
    )
    source = hf.Dinov2ForImageClassification(config)
    source.save_pretrained(tmp_path / "source")
    assert any("mlp.weights_in.weight" in key for key in load_file(tmp_path / "source" / "model.safetensors"))
    auto = hf.AutoModelForImageClassification
    model = auto.from_pretrained(tmp_path / "source", quantization_config=HalfbyteConfig())
    assert sum(".mlp." in name for name in layers(model)) == 3
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved", config=prequantized_config(tmp_path / "saved"))
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
