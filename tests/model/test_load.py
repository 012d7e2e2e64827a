"""load_model: the model transformers would give on the dequantized weights, out of every kind of folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoint.shard_writer import write_shards
from halfbyte.checkpoint.shards import SafetensorsFolder
from halfbyte.config import QuantConfig
from halfbyte.errors import ConfigError, ModelError
from halfbyte.model.load import LoadedModel, load_model
from halfbyte.model.quantize import quantize_model
from halfbyte.nn import FrozenLinear, Linear4bit
from halfbyte.quant import quantize

IDS = torch.arange(3, 43).view(2, 20)
ROUNDING = {"rtol": 0, "atol": 2e-5}
"""fp32 sums in another order; measured 4e-6 at logits of up to 6."""

MakeLlama = Callable[..., Path]


def load(folder: Path, compute_dtype: torch.dtype = torch.float32, **quant: Any) -> LoadedModel:
    return load_model(str(folder), QuantConfig(**quant), compute_dtype=compute_dtype)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def dequantized_reference(folder: Path, *, skip: tuple[str, ...] = ("lm_head",), **quant: Any) -> nn.Module:
    """transformers' own model in fp32, its linear weights quantized and dequantized in place."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] not in skip:
            weight = stored.get_submodule(name).weight
            transposed = isinstance(module, Conv1D)
            weight = quantize(weight.T.contiguous() if transposed else weight, **quant).dequantize(torch.float32)
            module.weight.copy_(weight.T if transposed else weight)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_transformers(make_llama: MakeLlama, tied: bool, max_shard_size: str, dtype: torch.dtype) -> None:
    folder = make_llama(dtype=dtype, max_shard_size=max_shard_size, tie_word_embeddings=tied)
    assert (folder / "model.safetensors.index.json").exists() is (max_shard_size == "60KB")
    loaded = load(folder)
    reference = dequantized_reference(folder)
    torch.testing.assert_close(logits(loaded.model), logits(reference), **ROUNDING)
    assert float((logits(reference) - logits(AutoModelForCausalLM.from_pretrained(folder))).abs().max()) > 0.01
    embedding, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    assert (head.weight is embedding.weight) is tied
    assert embedding.weight.dtype == dtype
    assert isinstance(head, FrozenLinear) is (dtype != torch.float32)
    assert not [name for name, p in loaded.model.named_parameters() if p.requires_grad or p.is_meta]
    assert not loaded.model.training


@pytest.mark.parametrize(
    "quant", [{"quant_type": "fp4"}, {"blocksize": 32}, {"blocksize": 4096}, {"double_quant": False}]
)
def test_recipes(tiny_llama: Path, quant: dict[str, Any]) -> None:
    loaded = load(tiny_llama, **quant)
    torch.testing.assert_close(logits(loaded.model), logits(dequantized_reference(tiny_llama, **quant)), **ROUNDING)
    expected = {"quant_type": "nf4", "blocksize": 64, "double_quant": True, "scale": "mse-signed"} | quant
    assert loaded.quant == expected
    absmax = load(tiny_llama, **quant, scale="absmax")
    assert absmax.quant | {"scale": "mse-signed"} == expected
    assert "scale" not in absmax.quant


def test_slices_change_nothing(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(tiny_llama)
    monkeypatch.setattr("halfbyte.model.read.SLICE_ELEMENTS", 300)
    assert load(tiny_llama).base_sha256 == whole.base_sha256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_compute(tiny_llama: Path, dtype: torch.dtype) -> None:
    loaded = load(tiny_llama, dtype)
    found = logits(loaded.model)
    assert found.dtype == dtype
    assert loaded.model.config.dtype == dtype
    exact = logits(dequantized_reference(tiny_llama))
    # Rounding of activations through two layers; measured 3.3 roundings of the largest logit in bf16, 2.5 in fp16.
    torch.testing.assert_close(
        found.float(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps * float(exact.abs().max())
    )


def test_gpt2_conv1d(tmp_path: Path) -> None:
    """GPT-2 stores its weights as (in, out); ours are (out, in) like everyone's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.1)
    GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert sum(isinstance(m, Linear4bit) for m in loaded.model.modules()) == 8
    torch.testing.assert_close(logits(loaded.model), logits(dequantized_reference(tmp_path)), **ROUNDING)
    skipped = load(tmp_path, skip_modules=("c_attn", "mlp.c_fc"))
    assert sum(isinstance(m, Linear4bit) for m in skipped.model.modules()) == 4
    reference = dequantized_reference(tmp_path, skip=("lm_head", "c_attn", "c_fc"))
    torch.testing.assert_close(logits(skipped.model), logits(reference), **ROUNDING)


def test_convolutions_compute_in_the_compute_dtype(tmp_path: Path) -> None:
    """LFM2 mixes short convolutions with attention; their weights in bf16 meet activations in fp32."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_multiple_of=16, initializer_range=0.1,
    )  # fmt: skip
    Lfm2ForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    found = logits(load(tmp_path).model)
    torch.testing.assert_close(found, logits(dequantized_reference(tmp_path)), **ROUNDING)


def test_skip_modules(tiny_llama: Path) -> None:
    loaded = load(tiny_llama, skip_modules=("down_proj", "model.layers.0.self_attn.q_proj"))
    kept = {name for name, m in loaded.model.named_modules() if isinstance(m, FrozenLinear)}
    assert kept == {
        "lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"quant\.skip_modules: 'dawn_proj' names no linear layer"):
        load(tiny_llama, skip_modules=("dawn_proj",))


def test_progress_is_told(tiny_llama: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    load_model(
        str(tiny_llama), QuantConfig(), compute_dtype=torch.float32, on_progress=lambda *told: seen.append(told)
    )
    total = len(SafetensorsFolder(tiny_llama).names())
    assert [done for done, _, _ in seen] == list(range(total + 1))
    assert {count for _, count, _ in seen} == {total}
    assert seen[-1][2] == ""


# -- the base's hash ---------------------------------------------------------------------------------------------


def test_hash_is_of_the_contents(make_llama: MakeLlama, tmp_path: Path) -> None:
    """The same in every compute dtype and however the files are cut; another one for one changed bit."""
    folder = make_llama()
    digest = load(folder).base_sha256
    for dtype in (torch.bfloat16, torch.float16):
        assert load(folder, dtype).base_sha256 == digest
    assert load(make_llama(max_shard_size="60KB")).base_sha256 == digest
    assert load(folder, blocksize=128).base_sha256 != digest
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        copy = shutil.copytree(folder, tmp_path / name)
        changed = dict(tensors)
        changed[name] = changed[name].clone()
        changed[name].view(-1)[5] += 1.0
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        assert load(copy).base_sha256 != digest, name


# -- bitsandbytes' folders ---------------------------------------------------------------------------------------


def save_with_bnb(source: Path, folder: Path, **settings: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto").save_pretrained(folder)


BNB_RECIPES = [
    {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"bnb_4bit_quant_type": "fp4"},
    {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", BNB_RECIPES, ids=["nf4-double", "fp4", "bf16-storage"])
def test_bitsandbytes_folder_byte_for_byte(
    make_llama: MakeLlama, tmp_path: Path, recipe: dict[str, Any], tied: bool
) -> None:
    save_with_bnb(make_llama(tie_word_embeddings=tied), tmp_path, **recipe)
    loaded = load(tmp_path, quant_type="nf4", blocksize=128)  # what the folder holds counts, not what is asked
    stored = SafetensorsFolder(tmp_path)
    layers = {name: m for name, m in loaded.model.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = layer.quantized_weight
        assert torch.equal(weight.codes, stored.read(f"{name}.weight").view(torch.uint8).view(-1)), name
        assert torch.equal(weight.absmax, stored.read(f"{name}.weight.absmax")), name
        if weight.nested_absmax is not None:
            assert torch.equal(weight.nested_absmax, stored.read(f"{name}.weight.nested_absmax")), name
    assert loaded.quant == {
        "quant_type": recipe["bnb_4bit_quant_type"], "blocksize": 64,
        "double_quant": recipe.get("bnb_4bit_use_double_quant", False),
    }  # fmt: skip
    assert torch.isfinite(logits(loaded.model)).all()
    if recipe.get("bnb_4bit_quant_type") == "nf4" and not recipe.get("bnb_4bit_use_double_quant"):
        assert (
            loaded.base_sha256
            == load(make_llama(tie_word_embeddings=tied), double_quant=False, scale="absmax").base_sha256
        )


def test_bitsandbytes_folder_keeps_what_its_maker_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    """Layers that the folder holds in 16 bits stay in 16 bits: the same model as in transformers + bitsandbytes."""
    save_with_bnb(
        tiny_llama, tmp_path, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "down_proj", "q_proj"]
    )
    loaded = load(tmp_path)
    kept = {name.rpartition(".")[2] for name, m in loaded.model.named_modules() if isinstance(m, FrozenLinear)}
    assert kept == {"lm_head", "down_proj", "q_proj"}
    reference = dequantized_reference(
        tiny_llama, skip=("lm_head", "down_proj", "q_proj"), double_quant=False, scale="absmax"
    )
    torch.testing.assert_close(logits(loaded.model), logits(reference), **ROUNDING)


# -- what is refused ---------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


def with_value(name: str, value: float, count: int) -> Callable[[Tensors, dict[str, Any]], object]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[1 : 1 + count] = value

    return change


def put(name: str, tensor: Tensor) -> Callable[[Tensors, dict[str, Any]], object]:
    return lambda tensors, config: tensors.__setitem__(name, tensor)


BAD_FOLDERS: dict[str, tuple[Callable[[Tensors, dict[str, Any]], object], str]] = {
    "NaN in a linear": (with_value(UP, math.nan, 3), rf"{UP}: has 3 NaN or Inf"),
    "Inf in an embedding": (with_value("model.embed_tokens.weight", math.inf, 2), "embed_tokens.weight: has 2 NaN or"),
    "NaN in a norm": (with_value("model.norm.weight", math.nan, 1), r"model\.norm\.weight: has 1 NaN or Inf"),
    "missing": (lambda t, c: t.pop(UP), f"1 of 21 tensors are missing, first {UP}"),
    "missing norm": (lambda t, c: t.pop("model.norm.weight"), "1 of 21 tensors are missing, first model.norm.weight"),
    "many missing": (
        lambda t, c: [t.pop(name) for name in list(t) if "layers.1" in name],
        r"9 of 21 tensors are missing, first (\S+, ){4}\S+\. Check",
    ),
    "a tensor too many": (put("layers.2.extra", torch.ones(3)), "1 tensors have no place .* first layers.2.extra"),
    "an adapter's tensor": (put(UP.replace("up_", "lora_"), torch.ones(3)), "1 tensors have no place"),
    "transposed": (put(UP, torch.randn(64, 96)), rf"{UP}: has shape \(64, 96\), the config says \(96, 64\)"),
    "short": (put(UP, torch.randn(95, 64)), rf"{UP}: has shape \(95, 64\), the config says \(96, 64\)"),
    "one dimension": (put(UP, torch.randn(96 * 64)), rf"{UP}: has shape \(6144,\), the config says \(96, 64\)"),
    "three dimensions": (put(UP, torch.randn(96, 64, 1)), rf"{UP}: has shape \(96, 64, 1\), the config says"),
    "empty": (put(UP, torch.randn(0, 64)), rf"{UP}: has shape \(0, 64\), the config says \(96, 64\)"),
    "integers": (put(UP, torch.ones(96, 64, dtype=torch.int64)), rf"{UP}: has dtype torch\.int64"),
    "float64": (put(UP, torch.randn(96, 64, dtype=torch.float64)), rf"{UP}: has dtype torch\.float64"),
    "integers in a norm": (
        put("model.norm.weight", torch.ones(64, dtype=torch.int64)), r"model\.norm\.weight: has dtype torch\.int64"
    ),
    "norm of another shape": (put("model.norm.weight", torch.ones(63)), r"norm\.weight: has shape \(63,\)"),
    "hidden size": (lambda t, c: c.update(hidden_size=128), "has shape .* the config says"),
    "vocabulary": (lambda t, c: c.update(vocab_size=321), r"embed_tokens\.weight: has shape .*\(321, 64\)"),
    "key-value heads": (lambda t, c: c.update(num_key_value_heads=4), r"k_proj\.weight: has shape \(32, 64\)"),
    "layers": (lambda t, c: c.update(num_hidden_layers=3), "9 of 30 tensors are missing"),
    "fewer layers": (lambda t, c: c.update(num_hidden_layers=1), "9 tensors have no place in the model"),
    "another quantization": (
        lambda t, c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is already quantized by gptq: only bitsandbytes' 4-bit format and halfbyte's own are read.",
    ),
    "8 bits": (
        lambda t, c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "is already quantized by bitsandbytes",
    ),
    "unknown architecture": (lambda t, c: c.update(model_type="no_such_model"), "the config cannot be read"),
    "not a language model": (lambda t, c: c.update(model_type="vit"), "no causal language model"),
    "a size that is a text": (lambda t, c: c.update(hidden_size="64"), "config|causal"),
    "no heads": (lambda t, c: c.update(num_attention_heads=0), "config|causal|shape"),
    "remote code": (
        lambda t, c: c.update(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "needs code from its own folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FOLDERS)
def test_bad_folders(tiny_llama: Path, tmp_path: Path, bad: str) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change, message = BAD_FOLDERS[bad]
    change(tensors, config)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    if bad.startswith(("NaN", "Inf", "integers", "norm of")):
        assert str(folder) in str(caught.value)
    with pytest.raises(ModelError, match=message):  # what cannot be loaded is not written either
        quantize_model(str(folder), tmp_path / "out", QuantConfig())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


def test_bad_bitsandbytes_folder(tiny_llama: Path, tmp_path: Path) -> None:
    save_with_bnb(tiny_llama, tmp_path, bnb_4bit_quant_type="nf4")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for changed, message in (
        ({f"{UP}.absmax": tensors[f"{UP}.absmax"] * math.inf}, f"{UP}: has 96 NaN or Inf in its scales"),
        ({UP: tensors[UP][:-1]}, f"{UP}: does not hold what its quant_state says"),
    ):
        save_file(tensors | changed, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message):
            load(tmp_path)
    del tensors[f"{UP}.quant_state.bitsandbytes__nf4"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{UP}: has no single quant_state"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "/no/such/folder: no such model"),
        ("", r"model\.path: no such model"),
        ("./relative/none", "no such model"),
    ],
)
def test_nothing_there(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(path, QuantConfig(), compute_dtype=torch.float32)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    for name, message in (
        ("pytorch_model.bin", "pickled weights are refused. Convert them"),
        ("notes.txt", "is a file. Give the model's folder"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ModelError, match=message):
            load(tmp_path / name)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)


def test_pickle_only_folder(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which can run code.*save_pretrained"):
        load(tmp_path)


# -- names -------------------------------------------------------------------------------------------------------


def test_folder_of_the_bare_decoder(tiny_llama: Path, tmp_path: Path, make_llama: MakeLlama) -> None:
    """Some folders hold "layers.0..." for "model.layers.0...", and a tied head or a rotary table besides."""
    folder = make_llama(tie_word_embeddings=True)
    tensors = {name.removeprefix("model."): t for name, t in load_file(folder / "model.safetensors").items()}
    shutil.copy(folder / "config.json", tmp_path)
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_shards(tmp_path, tensors.items())
    assert load(tmp_path).base_sha256 == load(folder).base_sha256


# -- the inventory -----------------------------------------------------------------------------------------------


def test_every_large_weight_is_quantized_or_listed(make_llama: MakeLlama) -> None:
    folder = make_llama(hidden_size=512, intermediate_size=1024, vocab_size=1024, num_hidden_layers=1)
    loaded = load(folder, skip_modules=("down_proj",))
    table = loaded.inventory
    listed = {name: (size, reason) for name, size, reason in table.unquantized}
    large = {name: p for name, p in loaded.model.named_parameters() if p.dim() == 2 and p.nbytes > 1_000_000}
    in_four_bits = {f"{name}.weight" for name, m in loaded.model.named_modules() if isinstance(m, Linear4bit)}
    assert set(listed) == set(large) - in_four_bits
    assert set(listed) == {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"}
    assert all(size == large[name].nbytes and reason for name, (size, reason) in listed.items())
    assert all(name in str(table) for name in listed)
    assert table.bytes == sum(
        tensor.nbytes for tensor in (*loaded.model.parameters(), *loaded.model.buffers())
    )  # fmt: skip
