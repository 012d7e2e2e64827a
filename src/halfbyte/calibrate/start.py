"""Where an adapter begins so that it makes up for what quantization changed in outputs (arXiv 2501.18475)."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.quant.error_feedback import Moments

EXTRA, ROUNDS = 16, 4
"""Of the randomised decomposition: directions beside those wanted, and rounds of refining them."""


def start_of(wanted: Tensor, decoded: Tensor, moments: Moments, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), float32, of least ||x wanted^T - x (decoded + B A)^T|| over the calibration text.

    What is missing, times a root of the inputs' second moments, cut to its r largest directions, and that root undone.
    Each row of A gets the norm that PEFT's own start gives it, about 1/sqrt(3), so that both factors learn as fast.

    Args:
        wanted, decoded: (out, in) float32, as it should be (`Moments.wanted`) and as it was written.
    """
    missing = (wanted - decoded) @ moments.factor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rank = min(r, *missing.shape)
        left, sizes, right = torch.svd_lowrank(missing, q=min(rank + EXTRA, *missing.shape), niter=ROUNDS)
    a = torch.linalg.solve_triangular(moments.factor.T, right[:, :rank], upper=True).T
    norms = a.norm(dim=1) * 3**0.5
    a, b = a / norms[:, None], left[:, :rank] * (sizes[:rank] * norms)
    return torch.nn.functional.pad(a, (0, 0, 0, r - rank)), torch.nn.functional.pad(b, (0, r - rank))
