"""LLaMA-Factory's YAML, and its data/dataset_info.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.elsewhere.datasets import as_one, share_held_out
from halfbyte.elsewhere.rules import Outcome, Rule, Source, always, nothing, preference, same
from halfbyte.elsewhere.trainer import (
    BITS,
    DEFAULTS,
    DTYPE,
    KERNELS,
    LOGGED,
    LORA,
    TRAINER,
    WORKERS,
    base_bits,
    targets,
    tokens,
    whole,
)

INFO = "dataset_info.json"
"""The key under which translate() finds that file, where it is."""

_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
         "system_tag": "system", "observation_tag": "tool"}  # fmt: skip


def _dataset(key: str) -> Rule:
    def rule(value: Any, config: Mapping[str, Any]) -> Outcome:
        names = value if isinstance(value, list) else str(value).split(",")
        info = config.get(INFO, {})
        entries = [info.get(str(name).strip(), {}) for name in names]
        folder = str(config.get("dataset_dir") or "data")
        paths = [_path(str(name).strip(), entry, folder) for name, entry in zip(names, entries, strict=True)]
        notes = [f"{INFO} does not describe {name}" for name, entry in zip(names, entries, strict=True) if not entry]
        settings = _format(entries[0]) if entries[0] else {}
        if any(entry.get("ranking") for entry in entries):
            return Outcome(refused=f"{key.removeprefix('data.')} with chosen and rejected answers")
        return as_one(paths, settings if key == "data.train" else {}, *notes, key=key)

    return rule


def _path(name: str, entry: Mapping[str, Any], folder: str) -> str:
    hub = entry.get("hf_hub_url")
    return str(hub) if hub else str(Path(folder, str(entry.get("file_name") or f"{name}.json")))


def _format(entry: Mapping[str, Any]) -> dict[str, Any]:
    """data.format and data.fields of one dataset of dataset_info.json."""
    columns, tags = (part if isinstance(part := entry.get(key), dict) else {} for key in ("columns", "tags"))
    if entry.get("formatting", "alpaca") == "alpaca":
        if set(columns) == {"prompt"}:  # of running text
            return {"data.format": "text"} | _named({"text": columns["prompt"]})
        return {"data.format": "alpaca"} | _named({_COLUMNS[key]: columns[key] for key in columns if key in _COLUMNS})
    messages = columns.get("messages", "conversations")
    if not tags:
        system = {"system": columns["system"]} if "system" in columns else {}
        return {"data.format": "sharegpt"} | _named({"conversations": messages} | system)
    default = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    said = {_TAGS[key]: name for key, name in (default | tags).items() if key in _TAGS}
    return {"data.format": "messages"} | _named({"messages": messages} | said)


def _named(names: Mapping[str, Any]) -> dict[str, Any]:
    fields = [f"{ours}={theirs}" for ours, theirs in names.items() if isinstance(theirs, str) and theirs != ours]
    return {"data.fields": fields} if fields else {}


def _finetuning(value: Any, _: Mapping[str, Any]) -> Outcome:
    return Outcome() if value == "lora" else Outcome(differs=f"adapters on a quantized base, in place of {value}")


def _stage(value: Any, config: Mapping[str, Any]) -> Outcome:
    if value == "pt":
        return Outcome(settings={"data.format": "text"})
    return preference("stage", harmless=("sft",))(value, config)


def _alpha(value: Any, config: Mapping[str, Any]) -> Outcome:
    return Outcome(settings={"lora.lora_alpha": value if value is not None else 2 * config.get("lora_rank", 8)})


LLAMAFACTORY = Source(
    name="llamafactory",
    marks=frozenset(
        {
            "finetuning_type",
            "stage",
            "cutoff_len",
            "lora_rank",
            "lora_target",
            "template",
            "quantization_bit",
            "dataset_dir",
            "overwrite_cache",
            "plot_loss",
            "preprocessing_num_workers",
            "model_name_or_path",
            "val_size",
        }
    ),
    defaults={**DEFAULTS, "lora_rank": 8, "lora_alpha": None, "cutoff_len": 2048, "packing": False},
    rules={
        **TRAINER,
        **{key: BITS[key] for key in ("load_in_8bit",)},
        **{key: LORA[key] for key in ("use_dora", "use_rslora")},
        "model_name_or_path": same("model.path"),
        "adapter_name_or_path": nothing("training begins at a new adapter; train.resume goes on from a checkpoint"),
        "quantization_bit": lambda value, _: base_bits(value),
        "quantization_method": always("bitsandbytes", "NF4 in bitsandbytes' format"),
        "quantization_type": same("quant.quant_type"),
        "double_quantization": same("quant.double_quant"),
        "stage": _stage,
        "finetuning_type": _finetuning,
        "lora_rank": same("lora.r"),
        "lora_alpha": _alpha,
        "lora_dropout": LORA["lora_dropout"],
        "lora_target": targets,
        "loraplus_lr_ratio": same("optim.lr_b_ratio"),
        "additional_target": whole,
        **dict.fromkeys(("add_tokens", "add_special_tokens", "new_special_tokens"), tokens),
        "resize_vocab": always(True, "tables grow where new tokens need it"),
        "pissa_init": nothing("see lora.init"),
        "pissa_iter": nothing("see lora.init"),
        "pissa_convert": nothing("see lora.init"),
        "create_new_adapter": always(True, "training begins at a new adapter"),
        **dict.fromkeys(("pref_beta", "pref_loss", "pref_ftx"), nothing("of preference tuning")),
        "dataset": _dataset("data.train"),
        "eval_dataset": _dataset("data.eval"),
        "dataset_dir": lambda _value, _: Outcome(),
        INFO: lambda _value, _: Outcome(),
        "template": lambda value, _: Outcome(differs=f"the tokenizer's own chat template, not {value}'s"),
        "cutoff_len": lambda value, _: Outcome(
            settings={"data.max_seq_len": value, "data.on_long": "truncate"},
            differs="a long sample loses its end; LLaMA-Factory shortens the question, too",
        ),
        "packing": same("data.packing"),
        "neat_packing": always(True, "neither attention nor positions cross samples"),
        "train_on_prompt": lambda value, _: Outcome(settings={"data.mask_prompt": not value}),
        "mask_history": nothing("every assistant turn is learned"),
        "max_samples": nothing("all samples train: head -n shortens the file"),
        "val_size": share_held_out,
        "overwrite_cache": nothing("data is tokenized anew for each run"),
        "preprocessing_num_workers": nothing(WORKERS),
        "streaming": nothing("data is read from a file"),
        "plot_loss": always(True, "curves.png is always drawn"),
        "flash_attn": nothing(KERNELS),
        "use_unsloth": nothing(KERNELS),
        "enable_liger_kernel": nothing(KERNELS),
        "upcast_layernorm": nothing("frozen weights keep their dtype"),
        "pure_bf16": lambda *_: Outcome(differs=DTYPE),
        "rope_scaling": nothing("positions are those of the model's config.json"),
        "shift_attn": nothing("attention is over whole sequences"),
        "use_galore": nothing("adapters train, with AdamW"),
        "use_badam": nothing("adapters train, with AdamW"),
        "use_swanlab": nothing(LOGGED),
        "disable_gradient_checkpointing": lambda value, _: Outcome(
            settings={"train.gradient_checkpointing": not value}
        ),
    },
)
