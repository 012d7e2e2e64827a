"""The adapter of a run: put on the base, and where it begins."""

from __future__ import annotations

import peft

from halfbyte.checkpoint import Adapter, check_base, load_adapter
from halfbyte.config import RunConfig
from halfbyte.data import TokenizedData
from halfbyte.errors import ConfigError
from halfbyte.model.adapt import attach_lora, begin_at
from halfbyte.model.load import LoadedModel
from halfbyte.model.tokens import Tokens
from halfbyte.plan.start import START
from halfbyte.train.observer import Observer


def attach(loaded: LoadedModel, config: RunConfig, observer: Observer, tokens: Tokens) -> peft.PeftModel:
    """The adapter that `config` says on the base, and what is worth knowing of it.

    Raises:
        ConfigError: it cannot be put there, or cannot begin where it is to.
    """
    model = attach_lora(loaded.model, config.lora, seed=config.train.seed, tokens=tokens)
    if config.lora.init != "random":
        start = _start(loaded, config)
        _check_layers(model, start)
        begin_at(model, start, config.lora.scaling)
        observer.note(f"adapter: begins at {loaded.source.path / START}")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = sum("lora_A" in name for name in trainable)
    observer.note(
        f"adapter: {layers} layers, {sum(p.numel() for p in trainable.values()):,} parameters in float32, "
        f"scaling {config.lora.scaling:g}{', DoRA' if config.lora.use_dora else ''}"
    )
    if tokens.ids:
        observer.note(_tokens_text(config, tokens))
    return model


def note_unseen(config: RunConfig, tokens: Tokens, data: TokenizedData, observer: Observer) -> None:
    """Say which tokens no training sample has: of these the head's rows alone can learn, and only not to be said."""
    unseen = [text for text, number in zip(config.lora.trainable_tokens, tokens.ids, strict=True)
              if not (data.input_ids == number).any()]  # fmt: skip
    if unseen:
        observer.note(f"tokens: no training sample has {', '.join(unseen)}")


def _tokens_text(config: RunConfig, tokens: Tokens) -> str:
    added = [text for text, number in zip(config.lora.trainable_tokens, tokens.ids, strict=True)
             if number in tokens.pieces]  # fmt: skip
    new = f"; added to the tokenizer: {', '.join(added)}, which begin as the mean of their pieces" if added else ""
    return f"tokens: the rows of {len(tokens.ids)} are trained{new}"


def _check_layers(model: peft.PeftModel, start: Adapter) -> None:
    """ConfigError where other layers have adapters than the start has."""
    here, there = ({name.partition(".lora_A.")[0] for name in names if ".lora_A." in name}
                   for names in (dict(model.named_parameters()), start.state))  # fmt: skip
    if here != there:
        kinds = ",".join(sorted({name.rpartition(".")[2] for name in there}))
        raise ConfigError(
            f"gives {len(here)} layers adapters", where="lora.target_modules", why=f"{start.folder} has {len(there)}",
            fix=f"Give --set lora.target_modules={kinds}, or quantize with the layers wanted",
        )  # fmt: skip


def _start(loaded: LoadedModel, config: RunConfig) -> Adapter:
    """What `halfbyte quantize` left beside the base to begin at."""
    start = load_adapter(loaded.source.path / START)
    check_base(start, loaded.base_sha256, base=config.model.path)
    return start
