"""PEFT's methods on the 4-bit base give what they give on the same weights decoded; docs/adapters.md lists them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.model.hf_config import HalfbyteConfig
from halfbyte.nn import Linear4bit

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's own, of methods it thinks of replacing
]
PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
ALL = {"target_modules": "all-linear"}
SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
SQUARE = {"target_modules": ["q_proj", "o_proj"]}

Make = Callable[[], Any]


def config(name: str, **kwargs: Any) -> Make:
    return lambda: getattr(peft, name)(task_type="CAUSAL_LM", **kwargs)


RUN: dict[str, Make] = {
    "LoRA": config("LoraConfig", **ALL),
    "LoRA, Gaussian A": config("LoraConfig", init_lora_weights="gaussian", **ALL),
    "rsLoRA": config("LoraConfig", use_rslora=True, **ALL),
    "DoRA": config("LoraConfig", use_dora=True, **ALL),
    "LoRA and `modules_to_save`": config("LoraConfig", modules_to_save=["lm_head"], **ALL),
    "LoRA and trainable tokens": config("LoraConfig", trainable_token_indices=[5, 6], **ALL),
    "AdaLoRA": config("AdaLoraConfig", total_step=20, **SOME),
    "VeRA": config("VeraConfig", r=8, **SQUARE),
    "RandLora": config("RandLoraConfig", r=8, **SOME),
    "MiSS": config("MissConfig", **SOME),
    "IA3": config("IA3Config", feedforward_modules=["down_proj"], **SOME),
    "RoAd": config("RoadConfig", **SOME),
    "OFT": config("OFTConfig", oft_block_size=8, **SOME),
    "BOFT": config("BOFTConfig", boft_block_size=8, **SOME),
    "FourierFT": config("FourierFTConfig", n_frequency=50, **SOME),
    "C3A": config("C3AConfig", block_size=16, **SOME),
    "LN tuning": config("LNTuningConfig"),
    "prefix tuning": config("PrefixTuningConfig", num_virtual_tokens=4),
    "prompt tuning": config("PromptTuningConfig", num_virtual_tokens=4),
    "P-tuning": config("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=32),
    "LLaMA-Adapter": config("AdaptionPromptConfig", adapter_len=4, adapter_layers=2),
}
REFUSED: dict[str, Make] = {
    "PiSSA": config("LoraConfig", init_lora_weights="pissa", **ALL),
    "OLoRA": config("LoraConfig", init_lora_weights="olora", **ALL),
    "orthogonal LoRA": config("LoraConfig", init_lora_weights="orthogonal", **ALL),
    "LoHa": config("LoHaConfig", **SOME),
    "LoKr": config("LoKrConfig", **SOME),
    "HRA": config("HRAConfig", **SOME),
    "SHiRA": config("ShiraConfig", r=4, **SOME),
}
"""They change or multiply the base's 16-bit weight."""


def losses(base: Any, make: Make) -> list[float]:
    """Of three steps."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base, make()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(2))
    found = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def ours(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=HalfbyteConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many heads as key-value heads, which PEFT's LLaMA-Adapter needs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=128, max_position_embeddings=64, tie_word_embeddings=False,
    )).save_pretrained(path)  # fmt: skip
    return path


@pytest.mark.parametrize("name", RUN)
def test_method_is_that_on_the_decoded_weights(name: str, folder: Path) -> None:
    quantized, plain = ours(folder), AutoModelForCausalLM.from_pretrained(folder)
    packed = {}
    for path, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            plain.get_submodule(path).weight.data.copy_(module.dequantize(torch.float32))
            packed[module] = module.codes.clone()
    found = losses(quantized, RUN[name])
    # Measured: 5e-7 at most, sums in another order.
    assert found == pytest.approx(losses(plain, RUN[name]), abs=1e-5)
    assert found[-1] < found[0]
    assert all(torch.equal(module.codes, before) for module, before in packed.items())


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_16_bit_weight_does_not_run(name: str, folder: Path) -> None:
    """An error, not a wrong result; when PEFT learns one of these, it belongs above."""
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        losses(ours(folder), REFUSED[name])


def test_the_page_lists_them() -> None:
    text = PAGE.read_text(encoding="utf-8")
    tables = re.findall(r"^\| (.+?) \|", text.split("## PEFT's methods on the 4-bit base")[1], re.MULTILINE)
    assert [name for name in tables if name in RUN] == list(RUN)
    assert [name for name in tables if name in REFUSED] == list(REFUSED)
