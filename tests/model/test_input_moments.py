"""Moments of text in chunks: those of all of it, and for one weight alone as for any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.model.input_moments import input_moments


def chunks(columns: int) -> tuple[list[Tensor], list[Tensor]]:
    """The wanted model's inputs and ours, and which tokens are text."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    both, counts = [], []
    for sequences, tokens in ((3, 64), (2, 128), (5, 64)):
        wanted = torch.randn(sequences, tokens, columns, generator=generator) @ mix
        ours = wanted + 0.1 * torch.randn(wanted.shape, generator=generator)
        both.append(torch.cat([wanted, ours]))
        counts.append(torch.rand(sequences, tokens, generator=generator) < 0.9)
    return both, counts


def test_the_moments_are_those_of_the_text() -> None:
    both, counts = chunks(40)
    found = input_moments(iter([x.clone() for x in both]), counts, None, False, torch.float32)
    wanted, ours = (
        torch.cat([x.chunk(2)[half][count] for x, count in zip(both, counts, strict=True)]).double() for half in (0, 1)
    )
    assert found.cross is not None
    torch.testing.assert_close(found.own, (ours.T @ ours).float(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.cross, (wanted.T @ ours).float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_for_one_weight_alone(dtype: torch.dtype, bound: float, capped: bool) -> None:
    """Measured: 1e-6 of what is wanted beyond the weight, in bfloat16 5e-3."""
    both, counts = chunks(1100)
    target = torch.randn(1100, 48, generator=torch.Generator().manual_seed(1)).T  # as GPT-2 has them
    alone, any_weight = (
        input_moments(iter([x.clone() for x in both]), counts, which, capped, dtype) for which in (target, None)
    )
    assert alone.cross is None
    found, expected = (moments.wanted(target.contiguous()) - target for moments in (alone, any_weight))
    assert (found - expected).norm() < bound * expected.norm()
