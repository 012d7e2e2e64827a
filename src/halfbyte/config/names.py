"""Layers that settings name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from halfbyte.errors import ConfigError


def matches(name: str, wanted: Sequence[str]) -> bool:
    """Whether `name` is one of `wanted`, or ends in one of them after a dot."""
    return any(name == want or name.endswith("." + want) for want in wanted)


def check_targets(target_modules: str | Sequence[str], linears: Iterable[str], experts: Collection[str] = ()) -> None:
    """See that lora.target_modules names layers among `linears`: all that may have an adapter.

    Args:
        experts: last parts of the names of a mixture's experts' layers.

    Raises:
        ConfigError: a name matches none (or only the output head, whose adapter would need all logits; or experts').
    """
    linears = list(linears)
    wanted = [] if isinstance(target_modules, str) else target_modules  # "all-linear"
    of_experts = [want for want in wanted if want.rpartition(".")[2] in experts]
    if of_experts:
        raise ConfigError(
            f"{', '.join(of_experts)} name experts' layers, which get no adapter", where="lora.target_modules",
            why="PEFT adapts experts in 16 bits only (target_parameters)",
            fix="Name the attention's: " + ", ".join(sorted({name.rpartition(".")[2] for name in linears})),
        )  # fmt: skip
    missing = [want for want in wanted if not any(matches(name, (want,)) for name in linears)]
    if missing:
        last_parts = sorted({name.rpartition(".")[2] for name in linears})
        raise ConfigError(
            f"{', '.join(missing)} name no layer that can have an adapter", where="lora.target_modules",
            fix="This model has " + ", ".join(last_parts),
        )  # fmt: skip


def check_skipped(skip_modules: Sequence[str], linears: Iterable[str]) -> None:
    """See that quant.skip_modules names layers among `linears`.

    Raises:
        ConfigError: an entry names none.
    """
    linears = list(linears)
    for want in skip_modules:
        if not any(matches(name, (want,)) for name in linears):
            raise ConfigError(f"{want!r} names no linear layer", where="quant.skip_modules")
