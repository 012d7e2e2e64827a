"""Mixtures through `from_pretrained`: in 4 bits expert by expert, trained, saved and read again."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import Tensor, nn

from halfbyte.config import QuantConfig
from halfbyte.errors import ModelError
from halfbyte.model import load_model
from halfbyte.model.hf_config import HalfbyteConfig, prequantized_config
from halfbyte.model.inventory import EXPERTS, inventory
from halfbyte.nn import Linear4bit
from halfbyte.nn.experts import layers_of
from halfbyte.quant import quantize

SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "mixtral": lambda: hf.MixtralConfig(**SMALL, intermediate_size=96, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **SMALL, intermediate_size=128, moe_intermediate_size=44, num_experts=4, head_dim=16
    ),
    "olmoe": lambda: hf.OlmoeConfig(**SMALL, intermediate_size=40, num_experts=4),
}
OTHER = {"gpt_oss": lambda: hf.GptOssConfig(**SMALL, intermediate_size=48, num_local_experts=4, head_dim=16)}
"""Experts stored transposed, with biases."""
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(7))

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(CONFIGS[request.param](), tmp_path_factory.mktemp(request.param))


def saved(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **kwargs: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def in_4_bits(model: nn.Module) -> dict[str, Linear4bit]:
    """The experts' layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit) and ".experts." in n}


def losses(model: Any, steps: int = 3) -> tuple[list[float], Tensor]:
    """Of LoRA on the attention; and the last gradient of the first layer's first adapter, which experts are behind."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        found.append(loss.item())
    gradient = trained[0].grad
    assert gradient is not None
    return found, gradient


def test_each_expert_is_quantized_by_itself(folder: Path) -> None:
    model, plain = load(folder, quantization_config=HalfbyteConfig()), load(folder)
    found = in_4_bits(model)
    assert len(found) == 2 * 4 * 3
    held = sum(layer.quantized_weight.nbytes for layer in found.values())
    assert held * 8 / sum(layer.in_features * layer.out_features for layer in found.values()) < 4.25
    for place, module in model.named_modules():
        if not layers_of(module):
            continue
        (gate, up, down), mlp = layers_of(module), plain.get_submodule(place)
        for number in range(4):
            wanted = dict(zip((gate, up), mlp.gate_up_proj[number].chunk(2), strict=True)) | {
                down: mlp.down_proj[number]
            }
            for layer, weight in wanted.items():
                mine, made = found[f"{place}.{number}.{layer}"].quantized_weight, quantize(weight.detach())
                assert torch.equal(mine.codes, made.codes)
                assert torch.equal(mine.dequantize(torch.float32), made.dequantize(torch.float32))
    listed = inventory(model, large=1000)
    assert not any(EXPERTS in reason for _, _, reason in listed.unquantized)
    assert not any(p.dim() == 3 for p in model.parameters())
    assert sum(row.parameters for row in listed.rows) == sum(p.numel() for p in plain.parameters()) + sum(
        b.numel() for b in plain.buffers()
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_as_the_decoded_weights_do(folder: Path, checkpointing: bool) -> None:
    """Measured: losses 5e-7, gradients 6e-7 of their norm apart. With absmax, for its weights give no gradient so near
    0 (2e-8 with signed scales) that Adam's first step is its rounding; before it they are 4e-7 apart with both."""
    model = load(folder, quantization_config=HalfbyteConfig(scale="absmax"))
    decoded = copy.deepcopy(model)
    decoded.dequantize()
    assert not in_4_bits(decoded)
    assert sum(p.dim() == 3 for p in decoded.parameters()) == 4
    assert len(in_4_bits(model)) == 24
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = [layer.codes.clone() for layer in in_4_bits(model).values()]
    (mine, gradient), (wanted, wanted_gradient) = losses(model), losses(decoded)
    assert mine[-1] < mine[0]
    assert mine == pytest.approx(wanted, abs=1e-5)
    assert float((gradient - wanted_gradient).norm() / wanted_gradient.norm()) < 1e-5
    assert all(torch.equal(a, s.codes) for a, s in zip(before, in_4_bits(model).values(), strict=True))


@pytest.mark.parametrize("how", ["from_pretrained", "prequantized_config", "halfbyte"])
def test_saved_it_is_read_again_to_the_bit(folder: Path, tmp_path: Path, how: str) -> None:
    """In a folder of our own: bitsandbytes has no experts in 4 bits, and must not take it for one of its."""
    model = load(folder, quantization_config=HalfbyteConfig())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "halfbyte"
    again = (
        load(tmp_path) if how == "from_pretrained"
        else load(tmp_path, config=prequantized_config(tmp_path)) if how == "prequantized_config"
        else load_model(str(tmp_path), QuantConfig(), compute_dtype=torch.float32).model
    )  # fmt: skip
    assert len(in_4_bits(again)) == 24
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_decoded_and_saved_it_is_a_plain_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = load(folder, quantization_config=HalfbyteConfig())
    model.dequantize()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as mine, safe_open(folder / "model.safetensors", "pt") as was:
        assert set(mine.keys()) == set(was.keys())
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_casting_leaves_bytes_and_scales_alone(folder: Path) -> None:
    model = load(folder, quantization_config=HalfbyteConfig(bnb_4bit_use_double_quant=False))
    before = {name: layer.dequantize() for name, layer in in_4_bits(model).items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(layer.dequantize(), before[name]) for name, layer in in_4_bits(model).items())


def test_nan_names_the_expert(tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
    model.get_parameter("model.layers.1.mlp.experts.down_proj").data[2, 0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.2\.w2"):
        load(tmp_path, quantization_config=HalfbyteConfig())


def test_named_ones_and_other_kinds_stay_as_they_are_and_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skip = HalfbyteConfig(llm_int8_skip_modules=["experts", "lm_head"])
    assert not in_4_bits(load(saved(CONFIGS["mixtral"](), tmp_path / "mixtral"), quantization_config=skip))
    with caplog.at_level(logging.WARNING, "halfbyte"):
        model = load(saved(OTHER["gpt_oss"](), tmp_path / "gpt_oss"), quantization_config=HalfbyteConfig())
    assert "4 tensors stay unquantized, model.layers.0.mlp.experts.gate_up_proj first" in caplog.text
    listed = {name: reason for name, _, reason in inventory(model, large=1000).unquantized}
    assert listed["model.layers.0.mlp.experts.gate_up_proj"] == EXPERTS


def test_files_may_hold_all_experts_in_one_tensor(tmp_path: Path) -> None:
    """As some families' do: split on the way in; `halfbyte train` says how to come to a folder that it reads."""
    apart, joined = saved(CONFIGS["mixtral"](), tmp_path / "apart"), tmp_path / "joined"
    load(apart).save_pretrained(joined, save_original_format=False)
    granite = hf.GraniteMoeConfig(**SMALL, intermediate_size=48, num_local_experts=4)
    with torch.no_grad():
        first, second = (load(path, quantization_config=HalfbyteConfig())(IDS).logits for path in (apart, joined))
        assert torch.equal(first, second)
        model = load(saved(granite, tmp_path / "granite"), quantization_config=HalfbyteConfig())
        assert len(in_4_bits(model)) == 24
        model.save_pretrained(tmp_path / "4bit")
        again = load_model(str(tmp_path / "4bit"), QuantConfig(), compute_dtype=torch.float32).model
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    for path in (joined, tmp_path / "granite"):
        with pytest.raises(
            ModelError, match=r"all experts of a layer in one tensor.*quantization_config=HalfbyteConfig"
        ):
            load_model(str(path), QuantConfig(), compute_dtype=torch.float32)
