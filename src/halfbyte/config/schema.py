"""What a run is asked to do: frozen, keyword-only dataclasses and the one table of defaults.

The string under a field is its help text everywhere: ``--help``, ``--set`` errors, the docs.
Defaults follow the QLoRA paper (arXiv 2305.14314, §4 and appendix B) unless the help says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from halfbyte.config.limits import LimitsConfig
from halfbyte.dtypes import COMPUTE_DTYPES, parse_bytes
from halfbyte.errors import ConfigError

QuantType = Literal["nf4", "fp4"]
Device = Literal["auto", "cpu", "cuda"]
Scale = Literal["auto", "absmax", "mse", "mse-signed"]
Schedule = Literal["constant", "linear", "cosine"]
Weights = Literal["resident", "mmap", "stream"]
Activations = Literal["resident", "disk"]
DataFormat = Literal["auto", "messages", "prompt", "alpaca", "sharegpt", "text"]
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _require(condition: bool, key: str, value: object, need: str) -> None:
    if not condition:
        raise ConfigError(f"{value!r} is not possible", where=key, why=need)


def _require_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    _require(value in choices, key, value, "choose one of " + ", ".join(map(str, choices)))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """[model]: the base model."""

    path: str = ""
    """A local folder (safetensors, 16-bit or bitsandbytes 4-bit), a .gguf file, or a hub id."""
    device: Device = "auto"
    """Where it computes: cpu, cuda, or auto, which is cuda where torch sees such a device."""

    def __post_init__(self) -> None:
        _require_choice("model.device", self.device, get_args(Device))


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """[quant]: how the base is held in 4 bits."""

    quant_type: QuantType = "nf4"
    """The 4-bit codebook: nf4 (quantiles of a normal law, the paper's) or fp4."""
    blocksize: int = 64
    """Weights that share one scale: 32 to 4096, a power of two."""
    double_quant: bool = True
    """Quantize the scales themselves to 8 bits: 4.127 instead of 4.5 bits per weight."""
    scale: Scale = "auto"
    """absmax (largest magnitude), mse (least error), mse-signed (either sign); auto: absmax, calibrated mse-signed."""
    calibrate: str = ""
    """`halfbyte quantize`: samples, JSON lines, whose text decides scales and codes; empty: the weights alone do."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What matrix products run in; auto takes what this hardware does fast and says why."""
    skip_modules: tuple[str, ...] = ()
    """Linear layers to leave unquantized, by full name or last part (the output head always is)."""
    embeddings: Literal["as_stored", "int8"] = "as_stored"
    """Input embeddings and output head in memory: as_stored (16 bits), or int8 with a scale for 64 weights."""

    def __post_init__(self) -> None:
        _require_choice("quant.quant_type", self.quant_type, get_args(QuantType))
        _require_choice("quant.blocksize", self.blocksize, BLOCKSIZES)
        _require_choice("quant.scale", self.scale, get_args(Scale))
        _require_choice("quant.compute_dtype", self.compute_dtype, ("auto", *COMPUTE_DTYPES))
        _require_choice("quant.embeddings", self.embeddings, ("as_stored", "int8"))

    @property
    def chosen_scale(self) -> str:
        """`scale`, auto decided."""
        return self.scale if self.scale != "auto" else "mse-signed" if self.calibrate else "absmax"

    @property
    def recipe(self) -> dict[str, Any]:
        """What the bytes of a 4-bit weight depend on, as it is recorded; the scale where it is not absmax."""
        more = {} if self.chosen_scale == "absmax" else {"scale": self.chosen_scale}
        return {"quant_type": self.quant_type, "double_quant": self.double_quant, "blocksize": self.blocksize, **more}

    def with_recipe(self, recipe: Mapping[str, Any]) -> QuantConfig:
        """These settings with the recorded `recipe`."""
        known = {key: recipe[key] for key in ("quant_type", "double_quant", "blocksize") if key in recipe}
        return replace(self, **known, scale=recipe.get("scale", "absmax"), calibrate="")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """[lora]: the adapters."""

    r: int = 16
    """Rank of A (r, in) and B (out, r). The paper uses 64 and finds no effect of r when all layers have one."""
    lora_alpha: float = 32.0
    """The update is scaled by lora_alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapter's input (the paper: 0.1 up to 13B, 0.05 above; small runs do better without)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """all-linear (every layer in 4 bits: not the head, not quant.skip_modules), or names, in full or last parts."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead, so that a large r helps."""
    init: Literal["random", "cloq"] = "random"
    """random (A uniform, B zero); cloq: what `halfbyte quantize` with quant.calibrate and this left by the base."""
    match_steps: int = 120
    """`halfbyte quantize` with init = "cloq": steps towards the 16-bit model's predictions; 0: none."""

    def __post_init__(self) -> None:
        _require(self.r >= 1, "lora.r", self.r, "the rank is at least 1")
        _require(
            0 < self.lora_alpha < math.inf, "lora.lora_alpha", self.lora_alpha, "an alpha of 0 or less trains nothing"
        )
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a probability, at least 0 and below 1")
        _require_choice("lora.init", self.init, ("random", "cloq"))
        _require(self.match_steps >= 0, "lora.match_steps", self.match_steps, "0 or more")
        _require(len(self.target_modules) > 0, "lora.target_modules", self.target_modules, "name at least one layer")

    @property
    def scaling(self) -> float:
        """The factor on B @ A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """[data]: what it is trained and evaluated on."""

    train: str = ""
    """Training samples, JSON lines."""
    eval: str = ""
    """Held-out samples, JSON lines; evaluated before and after training."""
    format: DataFormat = "auto"
    """messages, prompt (prompt/completion), alpaca, sharegpt or text; auto looks at the first record and says."""
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
        _require_choice("data.format", self.format, get_args(DataFormat))
        _require(self.max_seq_len >= 8, "data.max_seq_len", self.max_seq_len, "at least 8 tokens")
        _require_choice("data.on_long", self.on_long, ("skip", "truncate", "error"))
        _require_choice("data.on_bad_line", self.on_bad_line, ("error", "skip"))


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
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    max_grad_norm: float = 0.3
    """Gradients of all adapters together are scaled down to this norm; 0 leaves them."""

    def __post_init__(self) -> None:
        _require(0 < self.lr <= 1, "optim.lr", self.lr, "above 0 and at most 1")
        _require(0 < self.lr_b_ratio <= 1000, "optim.lr_b_ratio", self.lr_b_ratio, "above 0 and at most 1000")
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optim.betas", self.betas, "two numbers, each at least 0 and below 1",
        )  # fmt: skip
        _require(0 < self.eps < math.inf, "optim.eps", self.eps, "above 0 and finite")
        _require(0 <= self.weight_decay < 1, "optim.weight_decay", self.weight_decay, "at least 0 and below 1")
        _require_choice("optim.bits", self.bits, (32, 8))
        _require_choice("optim.schedule", self.schedule, get_args(Schedule))
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        _require(self.max_grad_norm >= 0, "optim.max_grad_norm", self.max_grad_norm, "0 or more")


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
    resume: str = "auto"
    """auto: go on from the newest checkpoint in output if there is one; never; or a checkpoint folder."""

    def __post_init__(self) -> None:
        for key, least in (("steps", 0), ("micro_batch_size", 1), ("gradient_accumulation_steps", 1), ("seed", 0),
                           ("eval_every", 0), ("save_every", 0), ("keep", 1)):  # fmt: skip
            value = getattr(self, key)
            _require(value >= least, f"train.{key}", value, f"at least {least}")
        _require(0 < self.epochs < math.inf, "train.epochs", self.epochs, "above 0 and finite")
        _require(self.seed < 2**63, "train.seed", self.seed, "below 2**63")


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
    """The base's 4-bit bytes: resident (in memory), mmap (shared, droppable) or stream (read as a layer computes)."""
    resident_layers: int = 0
    """Of streamed weights: decoder layers that stay in memory all the same."""
    activations: Activations = "resident"
    """What the backward pass needs: resident (in memory) or disk (in memory.offload_dir until it is needed)."""
    optimizer_budget: str = "1GB"
    """What stays in memory of paged moments (optim.paged): at least 8192 bytes, two pages."""
    offload_dir: str = ""
    """Folder for what does not fit into memory; a file without a name, gone with the process. Else train.output."""

    def __post_init__(self) -> None:
        _require_choice("memory.weights", self.weights, get_args(Weights))
        _require(self.resident_layers >= 0, "memory.resident_layers", self.resident_layers, "at least 0")
        for name in ("budget", "host_budget", "optimizer_budget"):
            key, value = f"memory.{name}", getattr(self, name)
            try:
                size = parse_bytes(value) if value else LEAST_PAGES
            except ValueError as error:
                raise ConfigError(str(error), where=key) from None
            least = LEAST_PAGES if name == "optimizer_budget" else 1
            _require(size >= least, key, value, f"at least {least} bytes")
        _require_choice("memory.activations", self.activations, get_args(Activations))


def check_warmup(optim: OptimConfig, steps: int) -> None:
    """See that the learning rate is reached within `steps`.

    Raises:
        ConfigError: it is not.
    """
    if optim.warmup_steps >= steps + (optim.schedule == "constant"):
        raise ConfigError(
            f"{optim.warmup_steps} warm-up steps leave nothing of {steps} steps",
            where="optim.warmup_steps", fix="Lower optim.warmup_steps or raise train.steps",
        )  # fmt: skip


def check_stored(weights: str, path: str, *, in_4_bits: bool) -> None:
    """See that there is a file with the very bytes that are used, where `weights` are not resident.

    Raises:
        ConfigError: the base called `path` is quantized while it is loaded, so there is none.
    """
    if weights != "resident" and not in_4_bits:
        raise ConfigError(
            f"is not stored in 4 bits, so its weights cannot be left on disk ({weights})", where=path,
            fix=f"Run: halfbyte quantize --model {path} --output DIR, and train on DIR",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One fine-tuning run. Sections are the tables of the TOML file; see each for its keys."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def __post_init__(self) -> None:
        if self.train.steps:
            check_warmup(self.optim, self.train.steps)
        output = self.train.output
        if output and Path(output).is_file():
            raise ConfigError("the output is a file", where=output, fix="Give a folder as train.output")


def require_config(config: object) -> None:
    """See that a caller in Python did not give a model's path, say.

    Raises:
        TypeError: it is no RunConfig.
    """
    if not isinstance(config, RunConfig):
        raise TypeError(
            f"a RunConfig is needed, not {config!r}; "
            'halfbyte.load_config(model__path="DIR") makes one, with any other setting by section__name'
        )


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Plain nested dict of `config`, tuples as lists (for JSON and for comparing runs)."""
    return {
        section.name: {
            f.name: list(value) if isinstance(value := getattr(part, f.name), tuple) else value for f in fields(part)
        }
        for section in fields(config)
        for part in (getattr(config, section.name),)
    }
