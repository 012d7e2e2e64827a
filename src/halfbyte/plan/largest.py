"""The most that a budget would carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from halfbyte.config import RunConfig
from halfbyte.plan.base import Base

MOST = {"micro_batch_size": 4096, "max_seq_len": 1 << 20, "num_hidden_layers": 1 << 12}
"""Where the search ends, where the model does not end it before."""

Peak = Callable[[RunConfig, Base], int]


def largest(config: RunConfig, base: Base, budget: int, peak: Peak) -> dict[str, int]:
    """Each alone, everything else as in `config`: no longer than the model's positions, no rank above full rank, and
    the layers of a larger model of the same width."""
    arch = base.architecture
    most = {**MOST, "max_seq_len": arch.context or MOST["max_seq_len"], "r": arch.hidden}
    now = {"micro_batch_size": config.train.micro_batch_size, "max_seq_len": config.data.max_seq_len,
           "r": config.lora.r, "num_hidden_layers": arch.layers}  # fmt: skip
    found = {}
    for name, least in now.items():
        low, high = least, max(most[name], least) + 1  # low fits
        while high - low > 1:
            middle = min((low + high) // 2, low * 2)
            if peak(*_with_value(config, base, name, middle)) <= budget:
                low = middle
            else:
                high = middle
        found[name] = low
    return found


def _with_value(config: RunConfig, base: Base, name: str, value: int) -> tuple[RunConfig, Base]:
    if name == "micro_batch_size":
        return replace(config, train=replace(config.train, micro_batch_size=value)), base
    if name == "max_seq_len":
        return replace(config, data=replace(config.data, max_seq_len=value)), base
    if name == "r":
        return replace(config, lora=replace(config.lora, r=value)), base
    return config, _with_layers(base, value)


def _with_layers(base: Base, layers: int) -> Base:
    arch = base.architecture
    sizes = {
        name: -(-getattr(base, name) * layers // arch.layers)
        for name in ("linears", "linear_weights", "expert_weights", "nested", "other")
    }
    return replace(base, architecture=replace(arch, layers=layers), **sizes)
