"""Softmax cross-entropy of rows of logits: read twice, written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.triton.decode import on_device_of

COLUMNS = 4096
"""Logits that a program looks at at a time."""


@triton.jit
def softmax_cross_entropy_kernel(logits, targets, losses, vocab, BLOCK: tl.constexpr):
    """A row's logits become softmax - onehot; losses[row] is its loss, NaN where the target is not in [0, vocab)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    first = logits + row * vocab
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    score = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(first + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, value)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        norm = norm * tl.exp(largest - shift) + tl.exp(value - shift)
        largest = higher
        score += tl.where(at == target, value, 0.0)
    most = tl.max(largest)
    log_norm = most + tl.log(tl.sum(norm * tl.exp(largest - most)))
    known = (target >= 0) & (target < vocab)
    tl.store(losses + row, tl.where(known, log_norm - tl.sum(score), float("nan")))
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(first + at, mask=at < vocab, other=0.0).to(tl.float32)
        result = tl.exp(value - log_norm) - tl.where(at == target, 1.0, 0.0)
        tl.store(first + at, result.to(logits.dtype.element_ty), mask=at < vocab)


def softmax_cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """`kernels.cross_entropy.softmax_cross_entropy_` of contiguous logits; a target out of range gives NaN."""
    losses = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.numel():
        with on_device_of(logits):
            softmax_cross_entropy_kernel[(logits.shape[0],)](
                logits, targets.contiguous(), losses, logits.shape[1], BLOCK=COLUMNS, num_warps=8
            )
    return losses.sum(dtype=torch.float64).float()
