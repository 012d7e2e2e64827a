"""The standard recipe with one import changed, on transformers' Trainer and TRL's SFTTrainer as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainers import arguments, check, packed, tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from halfbyte.model.hf_config import HalfbyteConfig

# peft 0.21, trl 1.16 and every recipe use the names transformers 5.23 has replaced by activation_checkpointing*.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


@pytest.mark.parametrize("reentrant", [None, True])
def test_transformers_trainer(llama: Any, tmp_path: Path, reentrant: bool | None) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 128, (4, 16)).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]

    model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    ))  # fmt: skip
    before = packed(model)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    if reentrant:  # the old kind of checkpointing needs inputs with a gradient, with every quantizer
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True} if reentrant else None)
    trainer = Trainer(model, TrainingArguments(**arguments(tmp_path)), train_dataset=data)
    trainer.train()

    check(trainer, before, tmp_path / "adapter", llama.folder)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_trl_sft_trainer(llama: Any, tmp_path: Path, checkpointing: bool) -> None:
    trl = pytest.importorskip("trl", reason="needs the package trl")
    from datasets import Dataset

    texts = [" ".join(f"w{(7 * i + j * j) % 120}" for j in range(12)) for i in range(4)]
    model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig())
    before = packed(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(tmp_path, gradient_checkpointing=checkpointing, max_length=32)),
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()

    check(trainer, before, tmp_path / "adapter", llama.folder)


def test_adapter_folders_load_onto_our_base_by_transformers_own_ways(llama: Any, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig())
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 15)[None]
    expected = model(ids).logits
    by_folder = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HalfbyteConfig())
    assert torch.equal(by_folder(ids).logits, expected)
    by_method = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig())
    by_method.load_adapter(str(tmp_path))
    assert torch.equal(by_method(ids).logits, expected)


def test_a_loaded_model_generates_and_copies(llama: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig())
    ids = torch.arange(3, 15)[None]
    made = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 16)
    assert torch.equal(copy.deepcopy(model).generate(ids, max_new_tokens=4, do_sample=False), made)


def preferences() -> Any:
    """Four prompts, each with an answer that is wanted and one that is not."""
    from datasets import Dataset

    def words(row: int, step: int) -> str:
        return " ".join(f"w{(7 * row + step * j * j + 3) % 120}" for j in range(6))

    return Dataset.from_list(
        [{"prompt": words(i, 1) + " ", "chosen": words(i, 2), "rejected": words(i, 3)} for i in range(4)]
    )


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_trl_dpo_trainer(llama: Any, tmp_path: Path, loss: str) -> None:
    """The reference is the base with the adapter off: the margin begins at zero, and grows."""
    trl = pytest.importorskip("trl", reason="needs the package trl")
    model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig())
    before = packed(model)
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(
            **arguments(tmp_path, gradient_checkpointing=False, max_length=32, loss_type=[loss], beta=0.1)
        ),
        train_dataset=preferences(),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert trainer.ref_model is None
    trainer.train()

    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == 0.0
    assert margins[-1] > 0.01
    check(trainer, before, tmp_path / "adapter", llama.folder)


@pytest.mark.parametrize("name", ["ORPO", "SimPO"])
def test_preferences_without_a_reference(llama: Any, tmp_path: Path, name: str) -> None:
    pytest.importorskip("trl", reason="needs the package trl")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    given = arguments(tmp_path, gradient_checkpointing=False, max_length=32)
    model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig())
    before = packed(model)
    made = (
        (ORPOTrainer, ORPOConfig(**given)) if name == "ORPO" else
        (CPOTrainer, CPOConfig(**given, loss_type="simpo", cpo_alpha=0.0))
    )  # fmt: skip
    trainer = made[0](
        model=model, args=made[1], train_dataset=preferences(), processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()

    check(trainer, before, tmp_path / "adapter", llama.folder)
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0]
