"""`halfbyte.fuse` in the standard recipe: the same losses, the same names, and the reason where it does not apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GraniteConfig, Trainer, TrainingArguments

import halfbyte
from halfbyte.nn import Linear4bit

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def train(folder: Path, output: Path, *, fused: bool, **settings: Any) -> tuple[list[float], list[str]]:
    """Losses of a few of the Trainer's steps, and the names of what it saves."""
    torch.manual_seed(0)
    config = halfbyte.HalfbyteConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    if fused:
        assert "2 decoder layers run as one function each" in halfbyte.fuse(model)
    ids = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1)).tolist()
    arguments = TrainingArguments(
        str(output), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_gives_the_same_losses(llama: Any, tmp_path: Path, checkpointing: bool) -> None:
    settings = {"gradient_checkpointing": checkpointing}
    plain = train(llama.folder, tmp_path, fused=False, **settings)
    fused = train(llama.folder, tmp_path, fused=True, **settings)
    assert fused[0] == pytest.approx(plain[0], abs=1e-5)
    assert fused[1] == plain[1]


def test_layers_that_do_something_of_their_own_are_left_alone() -> None:
    """Granite scales what its layers add: its linear layers alone are fused."""
    torch.manual_seed(0)
    config = GraniteConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, residual_multiplier=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, Linear4bit.from_weight(module.weight.data))
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(12)[None]
    expected = adapted(input_ids=ids).logits
    assert halfbyte.fuse(adapted) == (
        "14 adapted layers run as one function each; fused decoder layers gave another result"
    )
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected)
