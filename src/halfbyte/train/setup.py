"""Everything a run needs before its first step, in the order in which it is cheapest to fail."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import PreTrainedTokenizerBase

from halfbyte.checkpoint import latest_checkpoint, versions
from halfbyte.checkpoint.disk import folder_for
from halfbyte.config import RunConfig, to_dict
from halfbyte.config.schema import check_warmup
from halfbyte.data import BatchLoader, TokenizedData, Worst, count_overlap, load_data
from halfbyte.dtypes import format_bytes
from halfbyte.errors import ConfigError
from halfbyte.kernels import panel_rule
from halfbyte.model.compute_dtype import choose_compute_dtype
from halfbyte.model.load import LoadedModel, load_model
from halfbyte.model.placement import Placement, shard_layers
from halfbyte.model.source import check_weights, load_tokenizer, tokenizer_sha256
from halfbyte.model.tokens import NONE, Tokens, choose_tokens
from halfbyte.optim import AdamW, lora_param_groups
from halfbyte.plan import Machine, Plan, check_run, this_machine
from halfbyte.store import ActivationStore, LayerStore, memory_of
from halfbyte.train.attach import attach, note_unseen
from halfbyte.train.gpu import give_back, host_share, where_to_compute
from halfbyte.train.objective import Objective
from halfbyte.train.observer import Observer
from halfbyte.train.owners import Owners
from halfbyte.train.planning import in_the_same_parts, make_loader, offload_dir, plan_as_found, plan_run, steps_of
from halfbyte.train.ranks import ALONE, Ranks

FEW_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to train.

    Attributes:
        libraries: resident bytes of Python and libraries, as planned; None on a GPU.
        worst: the most that goes through the model in any batch of the run.
        config: with the plan's choices.
        checkpoint: the one to go on from; None: a fresh start.
        ranks: the processes that train together.
        owners: which of them keeps which moments, where they are sharded.
        tokens: whose rows are trained.
        model: the base with its adapter, in PEFT's wrapper.
        steps: optimizer steps of the whole run.
        hashes: sha256 of base, tokenizer and data: what a resumed run must find unchanged.
    """

    config: RunConfig
    plan: Plan
    worst: Worst
    libraries: int | None
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    data: TokenizedData
    eval_data: TokenizedData | None
    loader: BatchLoader
    loaded: LoadedModel
    model: peft.PeftModel
    objective: Objective
    optimizer: AdamW
    steps: int
    hashes: dict[str, str]
    checkpoint: Path | None
    ranks: Ranks = ALONE
    owners: Owners | None = None
    tokens: Tokens = NONE

    def beside_adapter(self, folder: Path) -> None:
        """Write into an adapter's folder what it needs beside its tensors: the tokenizer, where tokens were added."""
        if self.tokens.pieces:
            self.tokenizer.save_pretrained(folder)

    def moments(self) -> dict[str, Any]:
        """The optimizer's state for a checkpoint, to be read before the next step; where sharded, all ranks ask."""
        return self.owners.state_dict(self.optimizer) if self.owners else self.optimizer.streamed_state_dict()

    def load_moments(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint has of the optimizer."""
        if self.owners:
            self.owners.load_state_dict(self.optimizer, state)
        else:
            self.optimizer.load_state_dict(state)

    @property
    def peft_config(self) -> dict[str, Any]:
        """PEFT's config of the adapter."""
        return dict(self.model.peft_config["default"].to_dict())

    def adapter_info(self) -> dict[str, Any]:
        """What ``halfbyte.json`` says beside the adapter."""
        return {
            "base": self.config.model.path,
            "base_sha256": self.hashes["base"],
            "quant": self.loaded.quant,
            "chat_template": self.tokenizer.chat_template,
            "tokenizer_sha256": self.hashes["tokenizer"],
            "mask_policy": "assistant turns and their end token" if self.config.data.mask_prompt else "every token",
            "config": to_dict(self.config),
            "versions": versions(),
        }


def prepare(
    config: RunConfig, observer: Observer, machine: Machine | None = None, device: torch.device | None = None,
    on_planned: Callable[[Plan], None] = lambda made: None, ranks: Ranks = ALONE,
) -> Run:  # fmt: skip
    """Read data, plan, load the base in 4 bits, attach the adapter. What `check_paths` finds is not looked for again.

    Raises:
        HalfbyteError: whatever is wrong with config, data or model, before anything is trained.
    """
    machine = machine or this_machine()
    if device is None:
        config, machine, device = where_to_compute(config, machine, observer)
    with folder_for(Path(config.train.output)) if ranks.leads else nullcontext():
        run = _prepare(config, observer, machine, device, on_planned, ranks)
    give_back(device)
    return run


def _prepare(
    config: RunConfig, observer: Observer, machine: Machine, device: torch.device, on_planned: Callable[[Plan], None],
    ranks: Ranks,
) -> Run:  # fmt: skip
    random.seed(config.train.seed)
    np.random.seed(config.train.seed % 2**32)  # which takes no more
    torch.manual_seed(config.train.seed)
    tokenizer = load_tokenizer(config.model.path)
    tokens = choose_tokens(tokenizer, config.lora.trainable_tokens)
    data = load_data(config.data.train, tokenizer, config.data)
    eval_data = load_data(config.data.eval, tokenizer, config.data) if config.data.eval else None
    _report_data(observer, data, eval_data)
    note_unseen(config, tokens, data, observer)
    _check_steps(config, data, ranks)
    _check_sharding(config, ranks)
    checkpoint = _checkpoint_of(config, ranks)
    config = in_the_same_parts(config, checkpoint, observer, ranks)
    planned = plan_run(config, data, machine, observer, device, ranks)
    config = planned.config
    on_planned(planned.plan)
    loaded = _load(config, planned.plan, device, observer, ranks, tokens)
    model = attach(loaded, config, observer, tokens)
    objective = Objective(loaded.model, _activations(config, device))
    for part in (data, eval_data):
        if part is not None:
            objective.check_tokens(part)
    for decision in objective.decisions:
        observer.note(decision)
    if loaded.store is not None and not objective.fused:
        observer.note("layers: each is computed again in the backward pass, when its 4-bit bytes are there again")
    planned = plan_as_found(planned, data, observer, ranks, fused=objective.fused)
    config = planned.config
    if config.train.gradient_checkpointing:
        objective.checkpoint_layers()
    loader = make_loader(config, data, ranks)
    steps = steps_of(config, loader)
    observer.note(_steps_text(config, loader, steps))
    optimizer, owners = _make_optimizer(config, model, observer, ranks)
    return Run(
        config=config, plan=planned.plan, worst=planned.worst, libraries=planned.libraries,
        device=device, tokenizer=tokenizer, data=data, eval_data=eval_data, loader=loader, loaded=loaded,
        model=model, objective=objective, steps=steps, optimizer=optimizer, owners=owners,
        hashes={
            "base": loaded.base_sha256, "tokenizer": tokenizer_sha256(tokenizer), "data": data.report.sha256,
        },
        checkpoint=checkpoint, ranks=ranks, tokens=tokens,
    )  # fmt: skip


def _load(
    config: RunConfig, made: Plan, device: torch.device, observer: Observer, ranks: Ranks, tokens: Tokens
) -> LoadedModel:  # fmt: skip
    """The base as planned, and what is worth knowing of it."""
    compute_dtype, reason = choose_compute_dtype(config.quant.compute_dtype, device.type)
    observer.note(f"compute dtype {str(compute_dtype).removeprefix('torch.')}: {reason}")
    if device.type == "cpu":
        observer.note(panel_rule().explain(compute_dtype))
    observer.on_phase("load")
    sharded = config.train.sharding == "full"
    loaded = load_model(
        config.model.path, config.quant, compute_dtype=compute_dtype, device=device,
        placement=Placement(
            weights="stream" if sharded else "mmap" if made.shared else config.memory.weights,
            resident_layers=config.memory.resident_layers, memory=memory_of(device),
            host_budget=0 if sharded else host_share(config, device),
        ),
        on_progress=observer.load_progress, tokens=tokens,
    )  # fmt: skip
    observer.note(loaded.origin)
    if made.shared:
        observer.note(f"base: the machine's {made.ranks} ranks share one copy of {format_bytes(made.shared)}")
    if sharded and isinstance(loaded.store, LayerStore):
        store = shard_layers(loaded.model, loaded.store, ranks.mesh(device))
        loaded = replace(loaded, store=store)
        part, whole = format_bytes(store.nbytes), format_bytes(store.stored_bytes)
        observer.note(f"base: {part} of the layers' {whole} in each of {ranks.world} ranks, gathered as they compute")
    elif loaded.store is not None:
        observer.note(loaded.stream_text)
    observer.note(str(loaded.inventory))
    return loaded


def _check_sharding(config: RunConfig, ranks: Ranks) -> None:
    """ConfigError where there is nothing to shard, or nobody to shard it with."""
    if config.train.sharding == "none":
        return
    if ranks.world == 1:
        raise ConfigError(
            "'full' needs several ranks", where="train.sharding",
            fix="Start them with: torchrun --nproc-per-node N -m halfbyte train, or set it to none",
        )  # fmt: skip


def _check_steps(config: RunConfig, data: TokenizedData, ranks: Ranks) -> None:
    """ConfigError where the data is less than one step, or all its steps are warm-up."""
    loader, count = make_loader(config, data, ranks), config.train.gradient_accumulation_steps
    batches = loader.batches_per_epoch()
    if count > batches:
        raise ConfigError(
            f"{count} batches make a step, the data has {batches}", where="train.gradient_accumulation_steps",
            fix=f"Lower it to {batches} or less, or give more data",
        )  # fmt: skip
    check_warmup(config.optim, steps_of(config, loader))


def _checkpoint_of(config: RunConfig, ranks: Ranks) -> Path | None:
    resume = config.train.resume
    if resume == "auto":
        found = latest_checkpoint(config.train.output) if ranks.leads else None
        resume = ranks.first("never" if found is None else str(found))
    return None if resume == "never" else Path(resume)


def _activations(config: RunConfig, device: torch.device) -> ActivationStore | None:
    if config.memory.activations != "disk":
        return None
    return ActivationStore(offload_dir(config), memory_of(device), host_share(config, device))


def _make_optimizer(
    config: RunConfig, model: peft.PeftModel, observer: Observer, ranks: Ranks
) -> tuple[AdamW, Owners | None]:
    optim = config.optim
    groups = lora_param_groups(model.named_parameters(), optim.lr, optim.lr_b_ratio, optim.weight_decay)
    owners = Owners(groups, ranks) if config.train.sharding == "full" else None
    groups = owners.own_groups() if owners else groups
    optimizer = AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, bits=optim.bits, paged=optim.paged,
        budget=config.memory.optimizer_budget if optim.paged else None,
        offload_dir=offload_dir(config) if optim.paged else "",
    )  # fmt: skip
    if optim.paged:
        observer.note(f"optimizer states: {optimizer.reserve()}")
    return optimizer, owners


def check_paths(config: RunConfig) -> None:
    """HalfbyteError unless what must be set, readable and writable is: before anything is loaded."""
    check_run(config)
    check_weights(config.model.path)


def _steps_text(config: RunConfig, loader: BatchLoader, steps: int) -> str:
    unit = "packs" if config.data.packing else "samples"
    few = "; few steps teach little: raise train.epochs or lower data.max_seq_len" if steps < FEW_STEPS else ""
    ranks = f" on each of {loader.world} ranks" if loader.world > 1 else ""
    count, size = config.train.gradient_accumulation_steps, config.train.micro_batch_size
    return f"{steps} steps of {count} x {size} {unit}{ranks}; one pass is {loader.batches_per_epoch()} batches{few}"


def _report_data(observer: Observer, data: TokenizedData, eval_data: TokenizedData | None) -> None:
    for name, part in (("training", data), ("held-out", eval_data)):
        if part is None:
            continue
        report = part.report
        dropped = "".join(f", {count} dropped: {reason}" for reason, count in report.dropped.items())
        observer.note(
            f"{name} data: {report.kept:,} of {report.read:,} samples in format {report.format}{dropped}; "
            f"{report.tokens:,} tokens, {report.supervised_tokens:,} learned ({report.supervised_share:.0%})"
        )
        for note in report.notes:
            observer.note(f"{name} data: {note}")
    overlap = count_overlap(data, eval_data) if eval_data is not None else 0
    if overlap:
        observer.note(f"held-out data: {overlap} samples are in the training data too, so held-out loss flatters")
