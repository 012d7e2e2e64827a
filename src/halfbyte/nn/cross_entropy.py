"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.nn.frozen_linear import FrozenLinear

IGNORE_INDEX = -100
"""The label of a token that is not learned."""
CHUNK_BYTES = 64 * 2**20
"""Largest float32 logits buffer. One is alive at a time over a plain linear head, two over any other."""
CUDA_CHUNK_BYTES = 256 * 2**20
"""The same on a GPU, most of which fewer rows would leave idle."""


Score = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""Logits of some rows, which rows, and whether a gradient is wanted -> (their summed loss, its gradient or None)."""


class _Chunked(torch.autograd.Function):
    """A loss and its gradient in one pass over chunks of rows: logits live for one, the head gets no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Callable[[Tensor], Tensor], score: Score, rows: int) -> Tensor:
        needs_grad = hidden.requires_grad
        grad = torch.empty_like(hidden) if needs_grad else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            chunk = hidden[part].detach().requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                logits = head(chunk)
            loss, pull = score(logits.detach(), part, needs_grad)
            total += loss
            if grad is not None and pull is not None:
                (grad[part],) = torch.autograd.grad(logits, chunk, pull.to(logits.dtype))
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None


def chunked(rows: Tensor, head: Callable[[Tensor], Tensor], score: Score, rows_per_chunk: int) -> Tensor:
    """The sum of `score` over all `rows` (n, hidden_size), differentiable in them; never all logits at once."""
    total: Tensor = _Chunked.apply(rows, head, score, rows_per_chunk)  # type: ignore[no-untyped-call]
    return total


def chunked_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], vocab_size: int
) -> tuple[Tensor, int]:
    """Summed cross-entropy of predicting each token from the hidden state before it.

    Rows whose next label is IGNORE_INDEX never reach the head. The head is frozen, but for a `TrainedHead`'s rows.

    Args:
        hidden: (batch, tokens, hidden_size), what the head takes.
        labels: (batch, tokens) int64, aligned with the input tokens; the shift happens here. Best on the CPU.
        head: rows (n, hidden_size) -> logits (n, vocab_size).

    Returns:
        The sum over supervised tokens (float32 scalar, differentiable in `hidden`), and their number.
    """
    from halfbyte.nn.trained_rows import TrainedHead  # loads PEFT, which `HalfbyteConfig` must not

    targets = labels[:, 1:].reshape(-1)
    kept = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # on the CPU, where labels are: nothing waits for a GPU
    if kept.numel() == 0:
        return hidden.sum(dtype=torch.float32) * 0.0, 0
    targets, kept = targets[kept].to(hidden.device), kept.to(hidden.device)
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])[kept]
    rows_per_chunk = max((CUDA_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES) // (4 * vocab_size), 16)
    total: Tensor
    if isinstance(head, TrainedHead):
        if not head.disable_adapters:
            return head.loss_sum(rows, targets, rows_per_chunk), int(kept.numel())
        head = head.base_layer
    if _is_plain(head):
        need_dx = torch.is_grad_enabled() and rows.requires_grad
        total, _ = torch.ops.halfbyte.linear_cross_entropy(
            rows, targets, head.weight, head.bias, rows_per_chunk, need_dx, getattr(head, "scales", None)
        )
    else:
        total = chunked(rows, head, partial(_score, targets), rows_per_chunk)
    return total, int(kept.numel())


def _score(targets: Tensor, logits: Tensor, rows: slice, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    scores, target = logits.float(), targets[rows].unsqueeze(1)
    log_norm = torch.logsumexp(scores, dim=1, keepdim=True)
    loss = (log_norm - scores.gather(1, target)).sum()
    if not needs_grad:
        return loss, None
    pull = (scores - log_norm).exp_()
    return loss, pull.scatter_add_(1, target, pull.new_full(target.shape, -1.0))


def _is_plain(head: Callable[[Tensor], Tensor]) -> TypeGuard[nn.Linear]:
    """Whether calling `head` is no more than a frozen linear layer: nobody hooked, wrapped or trains it."""
    return (
        isinstance(head, nn.Linear)
        and type(head) in (nn.Linear, FrozenLinear)
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        and "forward" not in vars(head)
    )
