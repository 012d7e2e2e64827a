"""A budget of bits spread over layers: each raised to a wider format where that takes away the most error a bit."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from halfbyte.config.base import QuantConfig
from halfbyte.config.formats import bits_of
from halfbyte.errors import ConfigError
from halfbyte.quant.blocks import quantized_bytes

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers over one input stay in one format, because they are computed together."""


@dataclass(frozen=True)
class Unit:
    """Layers that are raised together.

    Attributes:
        shapes: of their weights.
        errors: what is lost in each of the formats to choose from.
    """

    layers: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    errors: tuple[float, ...]

    def bits(self, quant_type: str, quant: QuantConfig) -> int:
        """That they take in a format, scales included."""
        return bits_in(self.shapes, quant_type, quant)


def bits_in(shapes: Sequence[tuple[int, ...]], quant_type: str, quant: QuantConfig) -> int:
    """That weights of `shapes` take in a format, scales included."""
    return 8 * sum(quantized_bytes(shape, quant.blocksize, quant.double_quant, quant_type) for shape in shapes)


def formats_for(shapes: Sequence[tuple[int, ...]], quant: QuantConfig) -> tuple[str, ...]:
    """The formats to choose from, ascending in bits: the widest that `quant.bits` allows everywhere, and those above.

    Raises:
        ConfigError: there is none.
    """
    if bits_of(quant.quant_type) != 4:
        raise ConfigError(
            f"{quant.quant_type} is not the format of 4 bits that quant.bits mixes with nf2, nf3 and int8",
            where="quant.quant_type", fix="Leave it out, or take one of 4 bits",
        )  # fmt: skip
    found, weights = ["nf2", "nf3", quant.quant_type, "int8"], sum(map(prod, shapes))
    while len(found) > 1 and bits_in(shapes, found[1], quant) <= quant.bits * weights:
        del found[0]
    if (least := bits_in(shapes, found[0], quant)) > quant.bits * weights:
        raise ConfigError(f"{quant.bits:g} is not enough", where="quant.bits", why=f"nf2 takes {least / weights:.3f}")
    return tuple(found)


def unit_of(layer: str) -> str:
    """Layers of one unit have the same; the name itself for a layer on its own."""
    parent, _, name = layer.rpartition(".")
    return next((f"{parent}.{'+'.join(names)}" for names in TOGETHER if name in names), layer)


def spread(units: Sequence[Unit], formats: Sequence[str], quant: QuantConfig) -> dict[str, str]:
    """The format of each layer: together at most `quant.bits` a weight, scales included."""
    costs = [[unit.bits(name, quant) for name in formats] for unit in units]
    weights = sum(prod(shape) for unit in units for shape in unit.shapes)
    left = weights * quant.bits - sum(cost[0] for cost in costs)
    chosen = [0] * len(units)
    gains: list[tuple[float, int, int]] = []

    def offer(number: int) -> None:
        """The step up that takes away the most error a bit."""
        errors, cost, now = units[number].errors, costs[number], chosen[number]
        steps = [
            ((errors[rung] - errors[now]) / (cost[rung] - cost[now]), number, rung)
            for rung in range(now + 1, len(formats))
        ]
        if steps and min(steps)[0] < 0:
            heapq.heappush(gains, min(steps))

    for number in range(len(units)):
        offer(number)
    while gains:
        _, number, rung = heapq.heappop(gains)
        price = costs[number][rung] - costs[number][chosen[number]]
        if price <= left:
            left -= price
            chosen[number] = rung
            offer(number)
    return {layer: formats[rung] for unit, rung in zip(units, chosen, strict=True) for layer in unit.layers}
