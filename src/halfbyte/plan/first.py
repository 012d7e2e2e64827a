"""Settings to begin with, each with its reason, from what is known of the model, the data and the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.config.write import Setting
from halfbyte.dtypes import format_bytes
from halfbyte.plan.base import Base
from halfbyte.plan.planner import Plan

COVERED = 0.995
"""Share of the samples that the sequence length is to hold."""
ROUND = 64
SHORTEST, LONGEST = 512, 4096
"""Tokens of a sequence, where the data does not decide otherwise: packs below fill badly, above cost much memory."""
STEP_TOKENS = 4096
"""Tokens of an optimizer step, unless the data has too few for `LEAST_STEPS`."""
LEAST_STEPS = 50
"""Steps that an epoch is to have."""
SMALL_DATA = 5000
"""Samples below which three epochs are proposed."""
SAVED, EVALUATED = 10, 5
"""Checkpoints and evaluations in a run."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is known of the training data."""

    path: str
    format: str
    lengths: Sequence[int]
    """Tokens of each sample read."""
    scale: float = 1.0
    """Samples in the file / samples read."""


def sequence_length(base: Base, samples: Samples | None) -> Setting:
    """data.max_seq_len: what nearly all samples need, within what the model was made for."""
    context = base.architecture.context or LONGEST
    if samples is None:
        return Setting(value=min(1024, context), why="tokens of the longest sample; no data was given to measure")
    ordered = sorted(samples.lengths)
    need = ordered[math.ceil(COVERED * len(ordered)) - 1]
    value = min(max(-(-need // ROUND) * ROUND, SHORTEST), context)
    over = sum(length > value for length in ordered)
    left_out = f"{over / len(ordered):.1%} of the samples are longer and left out" if over else "holds every sample"
    why = f"{left_out}; the longest has {ordered[-1]} tokens"
    if value == SHORTEST > need:
        why += f". No less than {SHORTEST}: several samples share a sequence, and short ones fill badly"
    return Setting(value=value, why=why)


def first_settings(
    base: Base, length: int, samples: Samples | None, *, held_out: bool
) -> tuple[dict[str, Setting], int]:
    """Settings by "section.key" and steps of a run over packs of `length` tokens, before a plan makes them fit.

    Args:
        held_out: there is data to evaluate on.
    """
    weights = base.linear_weights
    rate, why = (
        (1e-3, "a model below half a billion weights learns a small set faster than at the paper's 2e-4")
        if weights < 5e8
        else (2e-4, "the QLoRA paper's up to 13B") if weights < 2e10 else (1e-4, "the QLoRA paper's above 13B")
    )  # fmt: skip
    found = {
        "lora.r": Setting(value=16, why="on all layers; the paper finds no effect of a larger one"),
        "lora.lora_alpha": Setting(value=32, why="2 r"),
        "data.packing": Setting(value=True, why="several samples in a sequence, none sees another: no padding"),
        "optim.lr": Setting(value=rate, why=why),
        "optim.schedule": Setting(value="cosine", why="falls to 0, so that the last steps settle"),
        "optim.warmup_steps": Setting(value=0.03, why="of all steps"),
        "train.seed": Setting(value=0, why="the same seed gives the same bytes"),
    }
    if samples is None:
        steps = 200
        found["train.steps"] = Setting(value=steps, why="no data was given to count; train.epochs counts passes")
        batch = max(1, STEP_TOKENS // length)
    else:
        tokens = int(sum(samples.lengths) * samples.scale)
        count = round(len(samples.lengths) * samples.scale)
        packs = max(1, math.ceil(tokens / length))
        batch = max(1, min(STEP_TOKENS // length, packs // LEAST_STEPS))
        epochs = 3 if count < SMALL_DATA else 1
        steps = max(1, math.ceil(packs / batch) * epochs)
        found["train.epochs"] = Setting(value=epochs, why=f"about {steps} steps: {count:,} samples, {tokens:,} tokens")
    why = f"{batch * length:,} tokens a step, one sequence at a time"
    found["train.gradient_accumulation_steps"] = Setting(value=batch, why=why)
    every, why = _every(steps, SAVED, "checkpoint")
    found["train.save_every"] = Setting(value=every, why=f"{why}; the same command goes on from the newest")
    if held_out:
        every, why = _every(steps, EVALUATED, "held-out loss")
        found["train.eval_every"] = Setting(value=every, why=why)
    return found, steps


def _every(steps: int, wanted: int, what: str) -> tuple[int, str]:
    """So many steps between two of some `wanted` in a run, and why."""
    every = max(1, steps // wanted)
    if every == 1:
        return every, f"a {what} after each step, for the run has about {steps}"
    return every, f"a {what} each {every} steps, some {steps // every} in the run"


def to_fit(made: Plan, settings: dict[str, Setting]) -> dict[str, Setting]:
    """What the plan `made` changed of a run with `settings`, for it to fit."""
    defaults = {
        "train.micro_batch_size": 1, "train.gradient_checkpointing": False, "optim.paged": False,
        "memory.weights": "resident", "memory.resident_layers": 0, "memory.activations": "resident",
    }  # fmt: skip
    changed = {}
    for name, default in defaults.items():
        value = made.choices[name.partition(".")[2]]
        if value != (settings[name].value if name in settings else default):
            changed[name] = Setting(value=value, why=f"to fit {format_bytes(made.budget or 0)}")
    if made.choices["optimizer_budget"] != "1GB" and made.choices["paged"]:
        changed["memory.optimizer_budget"] = Setting(value=made.choices["optimizer_budget"], why="of paged moments")
    return changed
