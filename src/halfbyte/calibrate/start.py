"""Adapters to begin at: what makes up for quantization, or what is not to be quantized at all."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.quant.moments import Moments

EXTRA, ROUNDS = 16, 4
"""Of the randomised decomposition: directions beside those wanted, and rounds of refining them."""


def start_of(wanted: Tensor, decoded: Tensor, moments: Moments, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), float32, of least ||x wanted^T - x (decoded + B A)^T|| over the calibration text.

    What is missing, times a root of the inputs' second moments, cut to its r largest directions, and that root undone
    (arXiv 2501.18475). Each row of A gets the norm that PEFT's own start gives it, about 1/sqrt(3), so that both
    factors learn as fast.

    Args:
        wanted, decoded: (out, in) float32, as it should be (`Moments.wanted`) and as it was written.
    """
    left, sizes, right = _largest((wanted - decoded) @ moments.factor, r)
    a = torch.linalg.solve_triangular(moments.factor.T, right, upper=True).T
    norms = a.norm(dim=1) * 3**0.5
    return _padded(a / norms[:, None], left * (sizes * norms), r)


def principal(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), float32, of least ||weight - B A||, the sizes shared as PiSSA and LoftQ share them:
    the factors that are stored, A and B / scaling, are of equal size.
    """
    left, sizes, right = _largest(weight, r)
    roots = (sizes / scaling).sqrt()
    return _padded(roots[:, None] * right.T, left * (roots * scaling), r)


def _largest(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular values of an (out, in) matrix, left vectors (out, r) and right ones (in, r)."""
    rank = min(r, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(matrix, q=min(rank + EXTRA, *matrix.shape), niter=ROUNDS)
    return left[:, :rank], sizes[:rank], right[:, :rank]


def _padded(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Of rank r, with zeros where a matrix has fewer singular values."""
    missing = r - len(a)
    return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
