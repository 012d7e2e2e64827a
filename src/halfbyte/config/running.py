"""The sections that say how it is trained: data, optimizer, loop, memory. schema.py has the rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from halfbyte.config.checks import require, require_choice
from halfbyte.dtypes import parse_bytes
from halfbyte.errors import ConfigError

Schedule = Literal["constant", "linear", "cosine"]
Weights = Literal["resident", "mmap", "stream"]
Activations = Literal["resident", "disk"]
DataFormat = Literal["auto", "messages", "prompt", "alpaca", "sharegpt", "segments", "text"]
FIELD_NAMES = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "segments",
    "text", "role", "content", "system", "user", "assistant", "tool",
)  # fmt: skip
"""What data.fields can say another name of: fields of a record, of a message, roles."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """[data]: what it is trained and evaluated on."""

    train: str = ""
    """Training samples, JSON lines or .parquet."""
    eval: str = ""
    """Held-out samples, JSON lines or .parquet; evaluated before and after training."""
    format: DataFormat = "auto"
    """messages, prompt, alpaca, sharegpt, segments or text (docs/data.md); auto looks at the first record and says."""
    fields: tuple[str, ...] = ()
    """What the file calls things otherwise, OURS=THEIRS: messages=dialog, role=from, content=value, user=customer."""
    max_seq_len: int = 1024
    """Tokens of the longest sample, and of a pack."""
    packing: bool = True
    """Put several samples into one sequence; neither attention nor positions cross from one to the next."""
    mask_prompt: bool = True
    """Learn only what the assistant says (and that it ends); false learns every token."""
    on_long: Literal["skip", "truncate", "error"] = "skip"
    """A sample longer than max_seq_len: skip it, truncate it, or stop. The count is reported."""
    on_bad_line: Literal["error", "skip"] = "error"
    """A line that is not a usable record: stop and name it, or skip and count."""

    def __post_init__(self) -> None:
        require_choice("data.format", self.format, get_args(DataFormat))
        for entry in self.fields:
            ours, _, theirs = entry.partition("=")
            require(bool(theirs), "data.fields", entry, "write OURS=THEIRS")
            require_choice("data.fields", ours, FIELD_NAMES)
        require(self.max_seq_len >= 8, "data.max_seq_len", self.max_seq_len, "at least 8 tokens")
        require_choice("data.on_long", self.on_long, ("skip", "truncate", "error"))
        require_choice("data.on_bad_line", self.on_bad_line, ("error", "skip"))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """[optim]: AdamW and its schedule."""

    lr: float = 2e-4
    """Learning rate (the paper: 2e-4 up to 13B, 1e-4 above)."""
    lr_b_ratio: float = 1.0
    """LoRA+: B learns this many times faster than A (the LoRA+ paper suggests 16)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    bits: Literal[32, 8] = 32
    """Of each moment that AdamW keeps: 32 (8 bytes a parameter) or 8 (2 bytes, blocks of 256; other numbers)."""
    paged: bool = False
    """Keep the moments in pages, beyond memory.optimizer_budget on disk; the same result to the bit."""
    schedule: Schedule = "constant"
    """constant, linear or cosine (both fall towards 0, which the step after the last would have), after warm-up."""
    warmup_steps: int | float = 0
    """Steps over which the learning rate rises linearly from 0; below 1: that share of all steps, rounded up."""
    max_grad_norm: float = 0.3
    """Gradients of all adapters together are scaled down to this norm; 0 leaves them."""

    def __post_init__(self) -> None:
        require(0 < self.lr <= 1, "optim.lr", self.lr, "above 0 and at most 1")
        require(0 < self.lr_b_ratio <= 1000, "optim.lr_b_ratio", self.lr_b_ratio, "above 0 and at most 1000")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optim.betas", self.betas, "two numbers, each at least 0 and below 1",
        )  # fmt: skip
        require(0 < self.eps < math.inf, "optim.eps", self.eps, "above 0 and finite")
        require(0 <= self.weight_decay < 1, "optim.weight_decay", self.weight_decay, "at least 0 and below 1")
        require_choice("optim.bits", self.bits, (32, 8))
        require_choice("optim.schedule", self.schedule, get_args(Schedule))
        require(
            self.warmup_steps >= 0 and (self.warmup_steps < 1 or float(self.warmup_steps).is_integer()),
            "optim.warmup_steps", self.warmup_steps, "0 or more steps, or a share of them below 1",
        )  # fmt: skip
        require(self.max_grad_norm >= 0, "optim.max_grad_norm", self.max_grad_norm, "0 or more")


def warmup_of(warmup_steps: float, steps: int) -> int:
    """Steps of the warm-up in a run of `steps`: below 1 it is a share of them."""
    return math.ceil(warmup_steps * steps) if warmup_steps < 1 else int(warmup_steps)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """[train]: the loop."""

    output: str = ""
    """Folder for the adapter, checkpoints, metrics and plots."""
    steps: int = 0
    """Optimizer steps; 0 counts them from epochs."""
    epochs: float = 1.0
    """Passes over the data, when steps is 0."""
    micro_batch_size: int = 1
    """Sequences in one forward and backward: packs with data.packing, samples without."""
    gradient_accumulation_steps: int = 1
    """Forward/backward passes in one optimizer step."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and recompute the rest in backward: less memory, about a third more time."""
    seed: int = 0
    """Seeds adapter initialisation, dropout and the order of samples; the same seed gives the same bytes."""
    eval_every: int = 0
    """Steps between evaluations on data.eval; 0 evaluates before and after only."""
    save_every: int = 0
    """Steps between checkpoints; 0 keeps only the finished adapter."""
    keep: int = 2
    """Checkpoints kept, newest first."""
    sharding: Literal["none", "full"] = "none"
    """Of several ranks: full leaves each a part of the base's layers and of the moments, gathered when needed."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint in output if there is one; never; or a checkpoint folder."""

    def __post_init__(self) -> None:
        for key, least in (("steps", 0), ("micro_batch_size", 1), ("gradient_accumulation_steps", 1), ("seed", 0),
                           ("eval_every", 0), ("save_every", 0), ("keep", 1)):  # fmt: skip
            value = getattr(self, key)
            require(value >= least, f"train.{key}", value, f"at least {least}")
        require_choice("train.sharding", self.sharding, ("none", "full"))
        require(0 < self.epochs < math.inf, "train.epochs", self.epochs, "above 0 and finite")
        require(self.seed < 2**63, "train.seed", self.seed, "below 2**63")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """[log]: who hears of the run while it goes on."""

    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """live (a view that draws itself anew), plain (lines), none; auto: live on a terminal, plain elsewhere."""
    tensorboard: bool = False
    """Event files for TensorBoard in train.output/tensorboard."""
    wandb: Literal["none", "offline", "online"] = "none"
    """A run of Weights & Biases: offline writes into train.output/wandb alone, online sends it."""

    def __post_init__(self) -> None:
        require_choice("log.progress", self.progress, ("auto", "live", "plain", "none"))
        require_choice("log.wandb", self.wandb, ("none", "offline", "online"))


LEAST_PAGES = 8192
"""Bytes of two pages (store/page_pool.py)."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """[memory]: what a run may take, and where things live."""

    budget: str = ""
    """Most memory of the device, from load to the last answer: "8GB"; default: what the container or the GPU has."""
    host_budget: str = ""
    """The same for the host's RAM beside a GPU; on the CPU both mean its RAM, and the smaller one holds."""
    weights: Weights = "resident"
    """The base's quantized bytes: resident (in memory), mmap (shared, droppable), stream (read as layers compute)."""
    resident_layers: int = 0
    """Of streamed weights: decoder layers that stay in memory all the same."""
    activations: Activations = "resident"
    """What the backward pass needs: resident (in memory) or disk (in memory.offload_dir until it is needed)."""
    optimizer_budget: str = "1GB"
    """What stays in memory of paged moments (optim.paged): at least 8192 bytes, two pages."""
    offload_dir: str = ""
    """Folder for what does not fit into memory; a file without a name, gone with the process. Else train.output."""

    def __post_init__(self) -> None:
        require_choice("memory.weights", self.weights, get_args(Weights))
        require(self.resident_layers >= 0, "memory.resident_layers", self.resident_layers, "at least 0")
        for name in ("budget", "host_budget", "optimizer_budget"):
            key, value = f"memory.{name}", getattr(self, name)
            try:
                size = parse_bytes(value) if value else LEAST_PAGES
            except ValueError as error:
                raise ConfigError(str(error), where=key) from None
            least = LEAST_PAGES if name == "optimizer_budget" else 1
            require(size >= least, key, value, f"at least {least} bytes")
        require_choice("memory.activations", self.activations, get_args(Activations))
