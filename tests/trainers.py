"""What tests with other people's trainers share: their arguments, a tokenizer, and what must hold afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from halfbyte.model.hf_config import HalfbyteConfig
from halfbyte.nn import Linear4bit


def packed(model: torch.nn.Module) -> list[torch.Tensor]:
    return [m.weight.detach().clone() for m in model.modules() if isinstance(m, Linear4bit)]


def check(trainer: Any, before: list[torch.Tensor], output: Path, base: Path) -> None:
    """The loss fell, the base did not move, every adapter did, and PEFT reads what was saved."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(a, b) for a, b in zip(packed(trainer.model), before, strict=True))
    adapters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in adapters.items())
    assert all(p.any() for name, p in adapters.items() if "lora_B" in name)
    trainer.save_model(str(output))
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, quantization_config=HalfbyteConfig()), output
    )
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


def arguments(output: Path, **kwargs: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "bf16": False, "seed": 0, "dataloader_pin_memory": False,
    } | kwargs  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(120))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
