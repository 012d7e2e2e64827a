"""The arguments of TRL's scripts, or of a script's own BitsAndBytesConfig, LoraConfig and SFTConfig, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.elsewhere.datasets import as_one
from halfbyte.elsewhere.rules import Outcome, Rule, Source, always, nothing, preference, same
from halfbyte.elsewhere.script import TRAINER as TRAINER_NAME
from halfbyte.elsewhere.trainer import BITS, DEFAULTS, DTYPE, LORA, TRAINER, WORKERS, targets


def dataset(value: Any, _: Mapping[str, Any]) -> Outcome:
    """A hub id or a file, or a list of them."""
    return as_one([str(part) for part in (value if isinstance(value, list) else [value])], {})


def _lora(key: str, command: float, script: float) -> Rule:
    """A key of the adapter, whose default is `command` for TRL's commands, `script` in PEFT's LoraConfig."""

    def rule(value: Any, config: Mapping[str, Any]) -> Outcome:
        default = command if config.get("use_peft") else script
        return Outcome(settings={key: value if value is not None else default})

    return rule


def _cut(value: Any, _: Mapping[str, Any]) -> Outcome:
    return Outcome(settings={"data.max_seq_len": value, "data.on_long": "truncate"})


_RANK = _lora("lora.r", 16, 8)


def _learned(value: Any, _: Mapping[str, Any]) -> Outcome:
    return Outcome(settings={"data.mask_prompt": bool(value)})


PREFERENCE = (
    "beta", "desirable_weight", "epsilon_high", "max_completion_length", "max_prompt_length", "num_generations",
    "precompute_ref_log_probs", "ref_model_init_kwargs", "reference_free", "reward_funcs", "rpo_alpha",
    "sync_ref_model", "undesirable_weight",
)  # fmt: skip
"""Keys of the configs of TRL's trainers that learn from preferences or rewards."""


def _loss_type(value: Any, _: Mapping[str, Any]) -> Outcome:
    if value not in ("nll", "chunked_nll", "dft"):
        return Outcome(refused=f"loss_type {value}")
    return Outcome() if value != "dft" else Outcome(differs="the loss is cross-entropy, unweighted")


TRL = Source(
    name="trl",
    in_parts=True,
    marks=frozenset(
        {
            "dataset_name",
            "dataset_text_field",
            "use_peft",
            "completion_only_loss",
            "assistant_only_loss",
            "lora_task_type",
            "use_bnb_nested_quant",
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "max_length",
            "task_type",
            "dataset_kwargs",
            "loss_type",
            *PREFERENCE,
        }
    ),
    defaults={
        **DEFAULTS,
        "learning_rate": 2e-5,
        "packing": False,
        "max_length": 1024,
        "use_bnb_nested_quant": False,
        "lora_r": None,
        "lora_alpha": None,
        "lora_dropout": None,
    },
    rules={
        **TRAINER,
        **LORA,
        **BITS,
        "model_name_or_path": same("model.path"),
        "model_name": same("model.path"),
        "model_id": same("model.path"),
        "model_revision": always("main", "the files of MODEL as they are"),
        "dtype": lambda *_: Outcome(differs=DTYPE),
        "torch_dtype": lambda *_: Outcome(differs=DTYPE),
        "use_peft": always(True, "adapters are trained, not all weights"),
        "r": same("lora.r"),
        "lora_r": lambda value, config: _RANK(config.get("r", value), config),
        "lora_alpha": _lora("lora.lora_alpha", 32, 8),
        "lora_dropout": _lora("lora.dropout", 0.05, 0.0),
        "lora_target_modules": targets,
        "lora_task_type": LORA["task_type"],
        "lora_modules_to_save": LORA["modules_to_save"],
        "use_bnb_nested_quant": same("quant.double_quant"),
        "quant_method": always("bitsandbytes", "bitsandbytes' format"),
        "peft_type": always("LORA", "LoRA adapters; PEFT's other methods through PEFT (docs/adapters.md)"),
        "dataset_name": dataset,
        "train_file": dataset,
        "dataset": dataset,
        "dataset_text_field": lambda value, _: Outcome(
            settings={} if value == "text" else {"data.fields": [f"text={value}"]}
        ),
        "dataset_train_split": nothing("data.train names a file"),
        "dataset_test_split": nothing("data.eval names a file"),
        "dataset_config": nothing("data.train names a file"),
        "dataset_streaming": nothing("data is read from a file"),
        "dataset_kwargs": nothing(WORKERS),
        "max_length": _cut,
        "max_seq_length": _cut,
        "packing": same("data.packing"),
        "packing_strategy": nothing("samples are packed whole"),
        "eval_packing": nothing("held-out samples are batched as data.packing says"),
        "padding_free": nothing("nothing is padded"),
        "pad_to_multiple_of": nothing("nothing is padded"),
        "completion_only_loss": _learned,
        "assistant_only_loss": _learned,
        "chat_template_path": nothing("the tokenizer's own chat template is used"),
        "activation_offloading": lambda value, _: Outcome(settings={"memory.activations": "disk"} if value else {}),
        "loss_type": _loss_type,
        TRAINER_NAME: lambda value, _: Outcome(refused=str(value)),
        **{key: preference(key, harmless=()) for key in PREFERENCE},
        "eos_token": nothing("the tokenizer's"),
        "pad_token": nothing("nothing is padded"),
        "device_map": nothing("--device chooses"),
        "inference_mode": nothing("training trains"),
        "use_cache": nothing("training keeps no cache"),
    },
)
