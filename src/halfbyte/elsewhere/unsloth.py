"""Unsloth's arguments: those of unsloth-cli.py, or of FastLanguageModel and the trainer, as JSON or as typed."""

from __future__ import annotations

from halfbyte.elsewhere.rules import Source, always, nothing, same
from halfbyte.elsewhere.trainer import HUB
from halfbyte.elsewhere.trl import TRL

HANDED_OVER = "afterwards: halfbyte merge --format 16bit|4bit|gguf"

UNSLOTH = Source(
    name="unsloth",
    in_parts=True,
    marks=frozenset(
        {
            "max_seq_length",
            "use_gradient_checkpointing",
            "random_state",
            "loftq_config",
            "save_method",
            "save_gguf",
            "full_finetuning",
            "fast_inference",
            "finetune_language_layers",
            "use_rslora",
            "r",
        }
    ),
    defaults={
        "max_seq_length": 2048,
        "r": 16,
        "lora_alpha": 16,
        "random_state": 3407,
        "learning_rate": 5e-5,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "packing": False,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
    },
    rules={
        **TRL.rules,
        "use_gradient_checkpointing": TRL.rules["gradient_checkpointing"],
        "random_state": same("train.seed"),
        "full_finetuning": always(False, "adapters are trained, not all weights"),
        "fast_inference": nothing("halfbyte serve serves"),
        "max_lora_rank": nothing("of its server"),
        "finetune_vision_layers": nothing("halfbyte train trains on text"),
        "finetune_language_layers": always(True, "name layers in lora.target_modules"),
        "finetune_attention_modules": always(True, "name layers in lora.target_modules"),
        "finetune_mlp_modules": always(True, "name layers in lora.target_modules"),
        **dict.fromkeys(
            ("save_model", "save_method", "save_gguf", "save_path", "quantization", "quantization_method"),
            nothing(HANDED_OVER),
        ),
        **dict.fromkeys(("push_model", "push_gguf", "hub_path", "token"), nothing(HUB)),
    },
)
