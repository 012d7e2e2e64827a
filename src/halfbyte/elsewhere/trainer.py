"""The keys of transformers' TrainingArguments and PEFT's LoraConfig: TRL, Unsloth and LLaMA-Factory share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.elsewhere.rules import Outcome, Rule, always, choice, flag, nothing, same

LOGGED = 'every step is logged to metrics.jsonl in the output, and to W&B with log.wandb = "offline" or "online"'
HUB = "halfbyte does not upload"
KERNELS = "halfbyte chooses kernels by what it measures: halfbyte doctor"
DTYPE = "quant.compute_dtype stays auto: what this machine computes fast; set bfloat16 for their arithmetic"
WORKERS = "data is read once, before training"
BEST = "the adapter kept is that of the last step"
MANY = "torchrun -m halfbyte train shares the steps among processes (docs/ranks.md)"


def optimizer(value: Any, _: Mapping[str, Any]) -> Outcome:
    """AdamW in 32 or 8 bits, paged or not, by the name of it."""
    name = str(value).lower()
    settings = {"optim.bits": 8 if "8bit" in name else 32, "optim.paged": name.startswith("paged")}
    if "adamw" in name and not any(other in name for other in ("galore", "apollo", "schedule_free", "anyprecision")):
        if "4bit" in name or "fp8" in name:
            return Outcome(settings={"optim.bits": 8}, differs=f"AdamW with moments in 8 bits in place of {value}")
        changed = {key: setting for key, setting in settings.items() if setting not in (32, False)}
        how = "other rounding: 8 bits in blocks of 256, the format is halfbyte's" if changed.get("optim.bits") else ""
        return Outcome(settings=changed, differs=how)
    return Outcome(settings={k: v for k, v in settings.items() if v is True}, differs=f"AdamW in place of {value}")


SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}


def schedule(value: Any, config: Mapping[str, Any]) -> Outcome:
    """The schedule of that name, or the nearest of those there are."""
    name = str(value).lower()
    if name not in SCHEDULES:
        ours = "cosine" if "cosine" in name else "linear" if "poly" in name else "constant"
        return Outcome(settings={"optim.schedule": ours}, differs=f"{ours} in place of {value}")
    warm = config.get("warmup_steps") or config.get("warmup_ratio")
    how = "in the warm-up one step ahead: no step is spent at a rate of 0" if warm else ""
    return Outcome(settings={"optim.schedule": SCHEDULES[name]}, differs=how)


CHECKPOINTING: Mapping[str, Outcome] = {
    "unsloth": Outcome(
        settings={"train.gradient_checkpointing": True},
        differs='inputs of layers stay in memory; memory.activations = "disk" moves them out',
    ),
    "offload": Outcome(
        settings={"train.gradient_checkpointing": True},
        differs='inputs of layers stay in memory; memory.activations = "disk" moves them out',
    ),
    "offload_disk": Outcome(settings={"train.gradient_checkpointing": True, "memory.activations": "disk"}),
    "true": Outcome(settings={"train.gradient_checkpointing": True}),
    "false": Outcome(settings={"train.gradient_checkpointing": False}),
}


def targets(value: Any, _: Mapping[str, Any]) -> Outcome:
    """lora.target_modules from a list, a text with commas, or a word for all of them."""
    if value in ("all", "all-linear", ["all"], ["all-linear"]):
        return Outcome(settings={"lora.target_modules": "all-linear"})
    names = value.split(",") if isinstance(value, str) else value
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return Outcome(missing="not a list of names")
    if isinstance(value, str) and set(value) & set("*|()[]^$+?\\"):
        return Outcome(
            settings={"lora.target_modules": "all-linear"},
            differs="all-linear in place of a regular expression; lora.target_modules takes names",
        )
    names = [name.strip() for name in names]
    tables = [name for name in names if name.rpartition(".")[2] in TABLES]
    if not tables:
        return Outcome(settings={"lora.target_modules": names})
    layers = [name for name in names if name not in tables]
    return Outcome(
        settings={"lora.modules_to_save": tables, **({"lora.target_modules": layers} if layers else {})},
        differs=f"{', '.join(tables)}: trained whole, as Unsloth does it; PEFT would give an adapter",
    )


def steps(value: Any, _: Mapping[str, Any]) -> Outcome:
    """max_steps; -1 and 0 leave it to the epochs."""
    return Outcome(settings={} if value in (-1, 0) else {"train.steps": value})


def epochs(value: Any, config: Mapping[str, Any]) -> Outcome:
    """Epochs, where no steps are given."""
    return Outcome(settings={} if steps(config.get("max_steps", 0), config).settings else {"train.epochs": value})


def when_counted(key: str, strategy: str) -> Rule:
    """Steps between two things; a share of all steps, or `strategy` by epochs, cannot be said in steps."""

    def rule(value: Any, config: Mapping[str, Any]) -> Outcome:
        if config.get(strategy) in ("no", "epoch", "best"):
            return Outcome()
        if isinstance(value, (int, float)) and value >= 1:
            return Outcome(settings={key: int(value)})
        return Outcome(missing=f"{key} counts steps")

    return rule


def report_to(value: Any, _: Mapping[str, Any]) -> Outcome:
    """log.tensorboard, log.wandb, by the names of the tools; "all" is both."""
    named = [str(name) for name in (value if isinstance(value, list) else [value])]
    settings: dict[str, Any] = {}
    notes = [f"{name} hears nothing" for name in named if name not in ("tensorboard", "wandb", "all", "none")]
    if {"tensorboard", "all"} & set(named):
        settings["log.tensorboard"] = True
    if "wandb" in named:
        settings["log.wandb"] = "offline"
        notes.append('nothing is sent; log.wandb = "online" does')
    return Outcome(settings=settings, differs="; ".join(notes))


def strategy(key: str) -> Rule:
    """When something is done: "steps" is said by another key."""
    how = f"{key} counts steps: halfbyte plan says how many there are"
    return choice(
        {"no": Outcome(), "steps": Outcome()} | dict.fromkeys(("epoch", "best"), Outcome(missing=how)),
        lambda value: Outcome(missing=f"{value!r} is not known here"),
    )


_START = "lora.init = {}: halfbyte quantize writes the base and the adapter to begin at"
LORA_INIT: Mapping[Any, Outcome] = {
    "pissa": Outcome(settings={"lora.init": "pissa"}, differs=_START.format("pissa")),
    "loftq": Outcome(settings={"lora.init": "loftq"}, differs=_START.format("loftq")),
    True: Outcome(),
    "true": Outcome(),
    "default": Outcome(),
    "gaussian": Outcome(differs="A is drawn uniformly, PEFT's default, not from a normal law"),
}


def warmup(value: Any, config: Mapping[str, Any]) -> Outcome:
    """warmup_steps, or warmup_ratio where that is not given: optim.warmup_steps below 1 is a share."""
    return Outcome(settings={"optim.warmup_steps": config.get("warmup_steps") or config.get("warmup_ratio") or value})


TABLES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
"""Input embeddings and output heads, as architectures call them."""


def _names(value: Any) -> list[str]:
    """A list of names, or a text of them with commas; none of another value."""
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [name.strip() for name in names if isinstance(name, str) and name.strip()]


def whole(value: Any, _: Mapping[str, Any]) -> Outcome:
    """lora.modules_to_save, of embedding and head."""
    names = _names(value)
    if bool(value) > bool(names) or any(name.rpartition(".")[2] not in TABLES for name in names):
        return Outcome(missing="only the input embedding and the output head are trained whole")
    return Outcome(settings={"lora.modules_to_save": names} if names else {})


def tokens(value: Any, config: Mapping[str, Any]) -> Outcome:
    """lora.trainable_tokens, from tokens that are to be added."""
    names = _names(value)
    if not names:
        return Outcome(missing="not a list of texts" if value else "")
    return Outcome(
        settings={"lora.trainable_tokens": names},
        differs="plain tokens, no special ones; their rows are trained, and begin as the mean of their pieces'",
    )


LORA: Mapping[str, Rule] = {
    "lora_alpha": same("lora.lora_alpha"),
    "lora_dropout": same("lora.dropout"),
    "use_rslora": flag("lora.use_rslora"),
    "target_modules": targets,
    "bias": always("none", "biases stay frozen"),
    "init_lora_weights": choice(LORA_INIT, lambda value: Outcome(missing=f"the start {value!r}: see lora.init")),
    "task_type": always("CAUSAL_LM", "halfbyte train trains causal language models; others through PEFT (README)"),
    "modules_to_save": whole,
    "use_dora": flag("lora.use_dora"),
    "loftq_config": nothing("see lora.init, and docs/fidelity.md"),
    "layers_to_transform": nothing("name the layers in lora.target_modules"),
    "rank_pattern": nothing("one rank for all layers"),
    "alpha_pattern": nothing("one alpha for all layers"),
    "fan_in_fan_out": nothing("weights are those of Linear layers"),
}

BASES = {8: "int8", 4: "", 3: "nf3", 2: "nf2"}
"""quant.quant_type of a base in so many bits; in 4 another key says it, or the default."""


def base_bits(bits: Any) -> Outcome:
    """A base in `bits` bits."""
    if not isinstance(bits, int) or bits not in BASES:
        return Outcome(differs=f"4 bits in place of {bits}")
    if not BASES[bits]:
        return Outcome()
    return Outcome(
        settings={"quant.quant_type": BASES[bits]}, differs="scales by blocks of 64, no outliers kept apart"
    )


BITS: Mapping[str, Rule] = {
    "load_in_4bit": always(True, "the base is held in 4 bits in any case"),
    "load_in_8bit": lambda value, _: base_bits(8 if value is True else 4),
    "bnb_4bit_quant_type": same("quant.quant_type"),
    "bnb_4bit_use_double_quant": same("quant.double_quant"),
    "bnb_4bit_compute_dtype": lambda value, _: Outcome(differs=DTYPE),
    "bnb_4bit_quant_storage": nothing("bytes are stored as uint8"),
    "llm_int8_skip_modules": same("quant.skip_modules"),
}

TRAINER: Mapping[str, Rule] = {
    "output_dir": same("train.output"),
    "learning_rate": same("optim.lr"),
    "lr_scheduler_type": schedule,
    "lr_scheduler_kwargs": nothing("the schedule takes no arguments"),
    "warmup_steps": warmup,
    "warmup_ratio": warmup,
    "num_train_epochs": epochs,
    "max_steps": steps,
    "per_device_train_batch_size": same("train.micro_batch_size"),
    "gradient_accumulation_steps": same("train.gradient_accumulation_steps"),
    "gradient_checkpointing": flag("train.gradient_checkpointing", beyond=CHECKPOINTING),
    "weight_decay": same("optim.weight_decay"),
    "max_grad_norm": same("optim.max_grad_norm"),
    "adam_beta1": lambda value, config: Outcome(settings={"optim.betas": [value, config.get("adam_beta2", 0.999)]}),
    "adam_beta2": lambda value, config: Outcome(settings={"optim.betas": [config.get("adam_beta1", 0.9), value]}),
    "adam_epsilon": same("optim.eps"),
    "optim": optimizer,
    "seed": same("train.seed"),
    "data_seed": nothing("train.seed decides the order, too"),
    "eval_steps": when_counted("train.eval_every", "eval_strategy"),
    "eval_strategy": strategy("train.eval_every"),
    "evaluation_strategy": strategy("train.eval_every"),
    "save_steps": when_counted("train.save_every", "save_strategy"),
    "save_strategy": strategy("train.save_every"),
    "save_total_limit": same("train.keep"),
    "per_device_eval_batch_size": nothing("held-out samples are batched as training samples are"),
    "bf16": lambda value, _: Outcome(differs=DTYPE) if value not in (False, "false") else Outcome(),
    "fp16": lambda value, _: Outcome(differs=DTYPE) if value not in (False, "false") else Outcome(),
    "neftune_noise_alpha": nothing("no noise is added to embeddings"),
    "label_smoothing_factor": nothing("targets are not smoothed"),
    "group_by_length": nothing("packing leaves no padding to save"),
    "load_best_model_at_end": nothing(BEST),
    "metric_for_best_model": nothing(BEST),
    "logging_steps": nothing(LOGGED),
    "logging_strategy": nothing(LOGGED),
    "logging_first_step": nothing(LOGGED),
    "report_to": report_to,
    "run_name": nothing("the output folder is the run's name"),
    "push_to_hub": nothing(HUB),
    "hub_model_id": nothing(HUB),
    "hub_token": nothing(HUB),
    "hub_strategy": nothing(HUB),
    "dataloader_num_workers": nothing(WORKERS),
    "dataset_num_proc": nothing(WORKERS),
    "remove_unused_columns": nothing("fields that are not used are ignored, with a note"),
    "tf32": nothing(KERNELS),
    "torch_compile": nothing(KERNELS),
    "attn_implementation": nothing(KERNELS),
    "use_liger_kernel": nothing(KERNELS),
    "deepspeed": nothing(MANY),
    "fsdp": nothing(MANY),
    "fsdp_config": nothing(MANY),
    "ddp_timeout": nothing(MANY),
    "ddp_find_unused_parameters": nothing(MANY),
    "local_rank": nothing(MANY),
    "resume_from_checkpoint": lambda value, _: Outcome(
        settings={"train.resume": value} if isinstance(value, str) and value not in ("true", "false") else {}
    ),
    "do_train": always(True, "halfbyte eval evaluates"),
    "do_eval": nothing("data.eval decides"),
    "overwrite_output_dir": nothing('a run goes on where it stopped; train.resume = "never" begins anew'),
    "trust_remote_code": nothing("no code of a model's repository is ever run"),
}

DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 3.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "per_device_train_batch_size": 8,
}
"""TrainingArguments', where ours are others."""
