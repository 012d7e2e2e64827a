"""Mixtures of experts that transformers holds in 3-D tensors: in 4 bits expert by expert, trained and saved."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from halfbyte.config import QuantConfig
from halfbyte.errors import ModelError
from halfbyte.model import load_model
from halfbyte.model.hf_config import HalfbyteConfig, prequantized_config
from halfbyte.model.inventory import EXPERTS, inventory
from halfbyte.nn.experts import ExpertStack
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


def stacks(model: nn.Module) -> dict[str, ExpertStack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}


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
    found = stacks(model)
    assert len(found) == 4
    for name, stack in found.items():
        for number, weight in enumerate(plain.get_parameter(name)):
            mine, wanted = stack.expert(number), quantize(weight.detach())
            assert torch.equal(mine.codes, wanted.codes)
            assert torch.equal(mine.dequantize(torch.float32), wanted.dequantize(torch.float32))
    listed = inventory(model, large=1000)
    assert not any(EXPERTS in reason for _, _, reason in listed.unquantized)
    weights = sum(plain.get_parameter(name).numel() for name in found)
    held = sum(stack.nbytes for stack in found.values())
    assert held == sum(b.nbytes for stack in found.values() for b in stack.buffers())
    assert held * 8 / weights < 4.25
    assert not any(p.dim() == 3 for p in model.parameters())
    assert sum(row.parameters for row in listed.rows) == sum(p.numel() for p in plain.parameters()) + sum(
        b.numel() for b in plain.buffers()
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_as_the_decoded_weights_do(folder: Path, checkpointing: bool) -> None:
    """Measured: losses 5e-7, gradients 6e-7 of their norm apart."""
    model = load(folder, quantization_config=HalfbyteConfig())
    decoded = copy.deepcopy(model)
    decoded.dequantize()
    assert not stacks(decoded)
    assert len(stacks(model)) == 4
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = [stack.codes.clone() for stack in stacks(model).values()]
    (mine, gradient), (wanted, wanted_gradient) = losses(model), losses(decoded)
    assert mine[-1] < mine[0]
    assert mine == pytest.approx(wanted, abs=1e-5)
    assert float((gradient - wanted_gradient).norm() / wanted_gradient.norm()) < 1e-5
    assert all(torch.equal(*pair) for pair in zip(before, (s.codes for s in stacks(model).values()), strict=True))


def test_saved_it_holds_the_decoded_experts(folder: Path, tmp_path: Path) -> None:
    """In the checkpoint's own layout, which nothing takes for 4 bits."""
    model = load(folder, quantization_config=HalfbyteConfig())
    model.save_pretrained(tmp_path)
    again = load(tmp_path, config=prequantized_config(tmp_path))
    assert not stacks(again)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_casting_leaves_bytes_and_scales_alone(folder: Path) -> None:
    model = load(folder, quantization_config=HalfbyteConfig(bnb_4bit_use_double_quant=False))
    before = {name: stack.dequantize() for name, stack in stacks(model).items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(stack.dequantize(), before[name]) for name, stack in stacks(model).items())


def test_nan_names_the_expert(tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
    model.get_parameter("model.layers.1.mlp.experts.down_proj").data[2, 0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.down_proj\[2\]"):
        load(tmp_path, quantization_config=HalfbyteConfig())


def test_named_ones_and_other_kinds_stay_as_they_are_and_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skip = HalfbyteConfig(llm_int8_skip_modules=["experts", "lm_head"])
    assert not stacks(load(saved(CONFIGS["mixtral"](), tmp_path / "mixtral"), quantization_config=skip))
    with caplog.at_level(logging.WARNING, "halfbyte"):
        model = load(saved(OTHER["gpt_oss"](), tmp_path / "gpt_oss"), quantization_config=HalfbyteConfig())
    assert "4 tensors stay unquantized, model.layers.0.mlp.experts.gate_up_proj first" in caplog.text
    listed = {name: reason for name, _, reason in inventory(model, large=1000).unquantized}
    assert listed["model.layers.0.mlp.experts.gate_up_proj"] == EXPERTS


def test_our_own_loader_says_which_one_to_take(tmp_path: Path) -> None:
    folder = saved(CONFIGS["mixtral"](), tmp_path)
    with pytest.raises(ModelError, match=r"stores experts one by one.*quantization_config=HalfbyteConfig"):
        load_model(str(folder), QuantConfig(), compute_dtype=torch.float32)
