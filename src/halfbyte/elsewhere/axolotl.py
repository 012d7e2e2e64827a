"""axolotl's YAML (as its config reference of 2026 has it)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.elsewhere.datasets import as_one, share_held_out
from halfbyte.elsewhere.rules import Outcome, Source, always, choice, flag, nothing, preference, same
from halfbyte.elsewhere.trainer import (
    BITS,
    CHECKPOINTING,
    HUB,
    KERNELS,
    LOGGED,
    LORA_INIT,
    MANY,
    TRAINER,
    WORKERS,
    schedule,
    targets,
    tokens,
    when_counted,
    whole,
)

INSTRUCT = "stands in the model's own chat template, not after 'Below is an instruction'"
COUNTED = "{} counts steps: halfbyte plan says how many there are"

TYPES: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "alpaca": ("alpaca", (), INSTRUCT),
    "alpaca_chat": ("alpaca", ("output=response",), INSTRUCT),
    "alpaca_chat.load_qa": ("prompt", ("prompt=question", "completion=answer"), INSTRUCT),
    "alpaca_w_system.load_open_orca": (
        "alpaca",
        ("system=system_prompt", "instruction=question", "output=response"),
        INSTRUCT,
    ),
    "gpteacher": ("alpaca", ("output=response",), INSTRUCT),
    "oasst": ("alpaca", ("instruction=INSTRUCTION", "output=RESPONSE"), INSTRUCT),
    "summarizetldr": ("prompt", ("prompt=article", "completion=summary"), INSTRUCT),
    "metharme": ("prompt", ("completion=generation",), "no tokens of metharme's own"),
    "sharegpt": ("sharegpt", (), ""),
    "chat_template": ("messages", (), ""),
    "completion": ("text", (), "a long text is skipped or truncated (data.on_long), not cut into several samples"),
    "input_output": ("segments", (), ""),
}
"""type -> (data.format, data.fields, what differs)."""


def _datasets(key: str) -> Any:
    def rule(value: Any, config: Mapping[str, Any]) -> Outcome:
        entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
        if not entries:
            return Outcome(missing="not a list of datasets")
        settings, note = _format(entries[0], config)
        paths = [_path(entry) for entry in entries]
        if len({str(entry.get("type")) for entry in entries}) > 1:
            note = "; ".join(filter(None, (note, "the files' types differ: bring them into one format")))
        return as_one(paths, settings if key == "data.train" else {}, *filter(None, [note]), key=key)

    return rule


def _path(entry: Mapping[str, Any]) -> str:
    files = entry.get("data_files")
    first = files[0] if isinstance(files, list) and files else files
    return str(first or entry.get("path") or "train.jsonl")


def _format(entry: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(settings, what differs) of one dataset."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        names = [f"{ours}={kind[f'field_{ours}']}" for ours in ("system", "instruction", "input", "output")
                 if isinstance(kind.get(f"field_{ours}"), str)]  # fmt: skip
        how = "format and no_input_format are not used: the model's own chat template is"
        return {"data.format": "alpaca", "data.fields": names}, how
    name = str(kind or "alpaca").partition(":")[0]
    if name not in TYPES:
        return {}, f"the type {kind!r} is not known here: see docs/data.md for what is read"
    format, fields, how = TYPES[name]
    names = list(fields) or (_message_names(entry) if name == "chat_template" else [])
    if name == "completion" and isinstance(entry.get("field"), str):
        names = [f"text={entry['field']}"]
    for unread in ("message_field_training", "message_field_training_detail", "split", "roles_to_train"):
        if entry.get(unread) not in (None, "train", ["assistant"]):
            how = "; ".join(filter(None, (how, f"{unread} is not read: every assistant turn is learned")))
    return {"data.format": format} | ({"data.fields": names} if names else {}), how


def _message_names(entry: Mapping[str, Any]) -> list[str]:
    """data.fields of a chat_template dataset: where the messages are, what is in them, who speaks."""
    properties = entry.get("message_property_mappings")
    properties = properties if isinstance(properties, dict) else {}
    theirs = {
        "messages": entry.get("field_messages"),
        "system": entry.get("field_system"),
        "role": properties.get("role", entry.get("message_field_role")),
        "content": properties.get("content", entry.get("message_field_content")),
    }
    names = [f"{ours}={name}" for ours, name in theirs.items() if isinstance(name, str) and name != ours]
    usual = {"user": ["human"], "assistant": ["gpt"]} if "role=from" in names else {}
    roles = given if isinstance(given := entry.get("roles"), dict) else usual
    return names + [
        f"{ours}={name}"
        for ours in ("user", "assistant", "system", "tool")
        for name in roles.get(ours) or []
        if name != ours
    ]


def _packing(value: Any, config: Mapping[str, Any]) -> Outcome:
    return Outcome(settings={"data.packing": value is True})


def _adapter(value: Any, _: Mapping[str, Any]) -> Outcome:
    if value == "qlora":
        return Outcome()
    return Outcome(differs=f"adapters on a quantized base, in place of {value or 'training all weights'}")


def _linear(value: Any, config: Mapping[str, Any]) -> Outcome:
    more = bool(config.get("lora_target_modules"))
    return Outcome(settings={"lora.target_modules": "all-linear"} if value is True and not more else {})


AXOLOTL = Source(
    name="axolotl",
    marks=frozenset(
        {
            "base_model",
            "datasets",
            "sequence_len",
            "micro_batch_size",
            "num_epochs",
            "sample_packing",
            "adapter",
            "lora_target_linear",
            "val_set_size",
            "lr_scheduler",
            "train_on_inputs",
        }
    ),
    defaults={
        "seed": 42,
        "sequence_len": 512,
        "num_epochs": 1.0,
        "lr_scheduler": "cosine",
        "max_grad_norm": 1.0,
        "adapter": None,
        "sample_packing": False,
        "learning_rate": 2e-4,
    },
    rules={
        **{
            key: TRAINER[key]
            for key in (
                "output_dir",
                "learning_rate",
                "warmup_steps",
                "warmup_ratio",
                "max_steps",
                "weight_decay",
                "max_grad_norm",
                "adam_beta1",
                "adam_beta2",
                "adam_epsilon",
                "seed",
                "gradient_accumulation_steps",
                "save_total_limit",
                "eval_strategy",
                "save_strategy",
                "logging_steps",
                "deepspeed",
                "fsdp",
                "fsdp_config",
                "local_rank",
                "tf32",
                "torch_compile",
                "hub_model_id",
                "hub_strategy",
                "group_by_length",
                "resume_from_checkpoint",
                "trust_remote_code",
                "load_best_model_at_end",
                "neftune_noise_alpha",
                "bf16",
                "fp16",
                "lr_scheduler_kwargs",
                "label_smoothing_factor",
            )
        },
        **{key: BITS[key] for key in ("load_in_4bit", "load_in_8bit")},
        "bnb_config_kwargs": lambda value, config: _kwargs(value, config),
        "base_model": same("model.path"),
        "model_type": nothing("the model's config.json says it"),
        "tokenizer_type": nothing("the tokenizer is the model's"),
        "tokenizer_config": nothing("the tokenizer is the model's"),
        "base_model_config": nothing("the config is the model's"),
        "adapter": _adapter,
        "lora_r": same("lora.r"),
        "lora_alpha": same("lora.lora_alpha"),
        "lora_dropout": same("lora.dropout"),
        "lora_target_modules": targets,
        "lora_target_linear": _linear,
        "lora_fan_in_fan_out": nothing("weights are those of Linear layers"),
        "lora_modules_to_save": whole,
        "lora_model_dir": nothing("training begins at a new adapter; train.resume goes on from a checkpoint"),
        "peft_use_rslora": flag("lora.use_rslora"),
        "peft_use_dora": flag("lora.use_dora"),
        "peft_init_lora_weights": choice(
            LORA_INIT, lambda value: Outcome(missing=f"the start {value!r}: see lora.init")
        ),
        "peft_layers_to_transform": nothing("name the layers in lora.target_modules"),
        "loraplus_lr_ratio": same("optim.lr_b_ratio"),
        "loraplus_lr_embedding": nothing("embeddings have no adapter"),
        "lora_mlp_kernel": nothing(KERNELS),
        "lora_qkv_kernel": nothing(KERNELS),
        "lora_o_kernel": nothing(KERNELS),
        "flash_attention": nothing(KERNELS),
        "xformers_attention": nothing(KERNELS),
        "sdp_attention": nothing(KERNELS),
        "s2_attention": nothing("attention is over whole sequences"),
        "plugins": nothing(KERNELS),
        "attn_implementation": nothing(KERNELS),
        "datasets": _datasets("data.train"),
        "test_datasets": _datasets("data.eval"),
        "val_set_size": share_held_out,
        "pretraining_dataset": nothing("data is read from a file, not streamed from the hub"),
        "dataset_prepared_path": nothing("data is tokenized anew for each run"),
        "dataset_processes": nothing(WORKERS),
        "push_dataset_to_hub": nothing(HUB),
        "shuffle_merged_datasets": always(True, "samples are shuffled"),
        "dataset_exact_deduplication": nothing("halfbyte data check counts duplicates; none is dropped"),
        "chat_template": always("tokenizer_default", "the tokenizer's own chat template is used"),
        "chat_template_jinja": nothing("the tokenizer's own chat template is used: write it there"),
        "default_system_message": nothing("write it into the data"),
        "special_tokens": nothing("they are the tokenizer's: set them in its tokenizer_config.json"),
        "tokens": tokens,
        "sequence_len": same("data.max_seq_len"),
        "sample_packing": _packing,
        "eval_sample_packing": nothing("held-out samples are batched as data.packing says"),
        "pad_to_sequence_len": nothing("nothing is padded"),
        "train_on_inputs": lambda value, _: Outcome(settings={"data.mask_prompt": not value}),
        "micro_batch_size": same("train.micro_batch_size"),
        "eval_batch_size": nothing("held-out samples are batched as training samples are"),
        "num_epochs": TRAINER["num_train_epochs"],
        "optimizer": TRAINER["optim"],
        "optim_args": nothing("see [optim]"),
        "lr_scheduler": schedule,
        "cosine_min_lr_ratio": nothing("cosine falls to 0"),
        "cosine_constant_lr_ratio": nothing("cosine falls to 0"),
        "gradient_checkpointing": flag("train.gradient_checkpointing", beyond=CHECKPOINTING),
        "gradient_checkpointing_kwargs": nothing("there is one way"),
        "eval_steps": when_counted("train.eval_every", "eval_strategy"),
        "save_steps": when_counted("train.save_every", "save_strategy"),
        "evals_per_epoch": nothing(COUNTED.format("train.eval_every")),
        "saves_per_epoch": nothing(COUNTED.format("train.save_every")),
        "early_stopping_patience": nothing("a run ends after its steps"),
        "eval_table_size": nothing("answers before and after stand in report.html"),
        "eval_max_new_tokens": nothing("answers before and after stand in report.html"),
        "gpu_memory_limit": lambda value, _: Outcome(
            settings={"memory.budget": f"{value}GB" if isinstance(value, int) else str(value)}
        ),
        "rl": preference("rl"),
        "reward_model": preference("reward_model"),
        "process_reward_model": preference("process_reward_model"),
        "trl": nothing("of preference tuning"),
        "relora_steps": nothing("one adapter is trained"),
        "device_map": nothing(MANY),
        "max_memory": nothing(MANY),
        **{
            f"wandb_{key}": nothing(LOGGED)
            for key in ("project", "entity", "watch", "name", "log_model", "mode", "run_id")
        },
        "use_tensorboard": flag("log.tensorboard"),
        "debug": nothing("--debug shows the traceback of an error"),
        "strict": nothing("an unknown setting is always an error"),
    },
)


def _kwargs(value: Any, config: Mapping[str, Any]) -> Outcome:
    """bnb_config_kwargs: the keys of BitsAndBytesConfig."""
    settings: dict[str, Any] = {}
    for key, part in (value if isinstance(value, dict) else {}).items():
        settings |= BITS[key](part, config).settings if key in BITS else {}
    return Outcome(settings=settings)
