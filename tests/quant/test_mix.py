"""A budget of bits over layers: within it, near the best, and what it cannot pay is said."""

from __future__ import annotations

import itertools

import pytest
import torch

from halfbyte.config import QuantConfig
from halfbyte.errors import ConfigError
from halfbyte.quant.mix import Unit, formats_for, spread, unit_of


def units(count: int, widths: int) -> list[Unit]:
    generator = torch.Generator().manual_seed(count)
    found = []
    for number in range(count):
        rows = 64 * 2 ** int(torch.randint(3, (), generator=generator))
        scale = float(torch.rand((), generator=generator)) ** 2
        found.append(Unit((f"layer{number}",), ((rows, 256),), tuple(scale * 16.0**-rung for rung in range(widths))))
    return found


@pytest.mark.parametrize(
    ("bits", "formats"),
    [
        (2.2, ["nf2", "nf3", "nf4", "int8"]), (3.12, ["nf2", "nf3", "nf4", "int8"]),
        (3.5, ["nf3", "nf4", "int8"]), (4.5, ["nf4", "int8"]), (8.5, ["int8"]),
    ],
)  # fmt: skip
def test_formats_begin_with_the_widest_that_all_can_have(bits: float, formats: list[str]) -> None:
    assert formats_for([(576, 1536)], QuantConfig(bits=bits)) == tuple(formats)


@pytest.mark.parametrize("quant_type", ["nf2", "nf3", "int8"])
def test_a_mix_has_one_format_of_four_bits(quant_type: str) -> None:
    with pytest.raises(ConfigError, match=rf"{quant_type} is not the format of 4 bits"):
        formats_for([(576, 1536)], QuantConfig(bits=4.5, quant_type=quant_type))


@pytest.mark.parametrize("bits", [2.3, 3.6, 4.2, 4.5, 6.0, 8.2])
def test_within_the_budget_and_near_the_best(bits: float) -> None:
    """Against every possible choice for 8 layers: measured the least error in all six cases."""
    quant = QuantConfig(bits=bits)
    formats = formats_for([(576, 1536)], quant)
    layers = units(8 if bits > 4 else 5, len(formats))
    weights = sum(unit.shapes[0][0] * 256 for unit in layers)

    def outcome(rungs: tuple[int, ...]) -> tuple[float, float]:
        each = list(zip(layers, rungs, strict=True))
        return sum(u.bits(formats[r], quant) for u, r in each) / weights, sum(u.errors[r] for u, r in each)

    chosen = spread(layers, formats, quant)
    paid, error = outcome(tuple(formats.index(chosen[f"layer{number}"]) for number in range(len(layers))))
    assert paid <= bits
    every = map(outcome, itertools.product(range(len(formats)), repeat=len(layers)))
    ratio = error / min(wrong for spent, wrong in every if spent <= bits)
    assert ratio <= 1.2


def test_layers_over_one_input_stay_together() -> None:
    layer = "model.layers.3.self_attn."
    assert len({unit_of(f"{layer}{name}_proj") for name in "qkv"}) == 1
    assert unit_of(f"{layer}o_proj") == f"{layer}o_proj"
    assert unit_of("model.layers.3.mlp.gate_proj") == unit_of("model.layers.3.mlp.up_proj")
    assert unit_of("model.layers.3.mlp.gate_proj") != unit_of("model.layers.4.mlp.gate_proj")


def test_a_budget_below_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quant\.bits: 2.1 is not enough: nf2 takes 2\.127"):
        formats_for([(576, 1536)], QuantConfig(bits=2.1))
