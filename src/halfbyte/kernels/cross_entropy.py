"""Cross-entropy over a large vocabulary, and over the frozen linear layer that makes the logits.

    softmax_cross_entropy_(logits, targets)   logits (n, vocab) become softmax - onehot, the loss's gradient
    linear_cross_entropy(hidden, targets, weight, bias, chunk_rows, need_dx, scales=None)
        the same over logits = hidden W^T + bias, of which it never holds more than a chunk; W as for linear_frozen

The loss is summed over rows, a float32 scalar; targets are int64, each in [0, vocab).
"""

from __future__ import annotations

import ctypes as ct
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.abi import DTYPES
from halfbyte.kernels.buffers import empty, empty_like
from halfbyte.kernels.frozen_linear import check_product, dx_into, linear_into
from halfbyte.kernels.registry import run_native

torch.library.define("halfbyte::softmax_cross_entropy_", "(Tensor(a!) logits, Tensor targets) -> Tensor")
torch.library.define(
    "halfbyte::linear_cross_entropy",
    "(Tensor hidden, Tensor targets, Tensor weight, Tensor? bias, int chunk_rows, bool need_dx, Tensor? scales=None)"
    " -> (Tensor, Tensor)",
)


def _check(logits: Tensor, targets: Tensor) -> None:
    torch._check(logits.is_floating_point(), lambda: f"logits must be floating, not {logits.dtype}")
    torch._check(targets.dtype == torch.int64, lambda: f"targets must be int64, not {targets.dtype}")
    torch._check(
        logits.dim() == 2 and targets.shape == logits.shape[:1],
        lambda: f"targets of {tuple(targets.shape)} for logits of {tuple(logits.shape)}",
    )


def _check_head(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> None:
    check_product(hidden, weight, weight.shape[-1], bias, scales)
    _check(hidden, targets)


def _check_range(targets: Tensor, vocab: int) -> None:
    if targets.numel():
        least, largest = (int(bound) for bound in targets.aminmax())
        if least < 0 or largest >= vocab:
            raise IndexError(f"target {least if least < 0 else largest} is not in a vocabulary of {vocab}")


def plain_softmax_cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The specification: any device; float32 (float64 for float64 logits) between reading and writing."""
    _check(logits, targets)
    _check_range(targets, logits.shape[1])
    shifted = logits if logits.dtype == torch.float64 else logits.float()
    shifted = shifted - shifted.amax(1, keepdim=True)
    target = targets.unsqueeze(1)
    score = shifted.gather(1, target)
    softmax = shifted.exp_()
    norm = softmax.sum(1, keepdim=True, dtype=torch.float64)
    loss = (norm.log() - score).sum().float()
    softmax /= norm.to(softmax.dtype)
    softmax.scatter_add_(1, target, softmax.new_full(target.shape, -1.0))
    logits.copy_(softmax)
    return loss


torch.library.impl("halfbyte::softmax_cross_entropy_", "CompositeExplicitAutograd", plain_softmax_cross_entropy_)


def _loss_of(logits: Tensor, targets: Tensor, *, write: bool) -> float:
    """The loss of logits on the CPU; with `write` its gradient takes their place, without they may be lost."""
    loss = ct.c_double()
    served = logits.dtype in DTYPES and logits.is_contiguous() and run_native(
        "hb_softmax_cross_entropy", logits.data_ptr(), DTYPES[logits.dtype], *logits.shape, targets.data_ptr(),
        ct.byref(loss), write,
    )  # fmt: skip
    return loss.value if served else float(plain_softmax_cross_entropy_(logits, targets))


@torch.library.impl("halfbyte::softmax_cross_entropy_", "CPU")
def _softmax_cpu(logits: Tensor, targets: Tensor) -> Tensor:
    _check(logits, targets)
    _check_range(targets, logits.shape[1])
    return torch.tensor(_loss_of(logits, targets.contiguous(), write=True), dtype=torch.float32)


@torch.library.register_fake("halfbyte::softmax_cross_entropy_")
def _softmax_fake(logits: Tensor, targets: Tensor) -> Tensor:
    _check(logits, targets)
    return logits.new_empty((), dtype=torch.float32)


def plain_linear_cross_entropy(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int, need_dx: bool,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The specification: chunk by chunk over the operators above."""
    _check_head(hidden, targets, weight, bias, scales)
    ops = torch.ops.halfbyte
    loss = hidden.new_zeros((), dtype=torch.float64)
    dx = torch.empty_like(hidden) if need_dx else hidden.new_empty(0)
    for start in range(0, hidden.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = ops.linear_frozen(hidden[rows], weight, bias, scales)
        loss += ops.softmax_cross_entropy_(logits, targets[rows])
        if need_dx:
            dx[rows] = ops.linear_frozen_dx(logits, weight, scales)
        del logits  # before the next chunk's are made
    return loss.float(), dx


torch.library.impl("halfbyte::linear_cross_entropy", "CompositeExplicitAutograd", plain_linear_cross_entropy)


@torch.library.impl("halfbyte::linear_cross_entropy", "CPU")
def _linear_cross_entropy_cpu(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int, need_dx: bool,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the plain one, in one buffer for the logits of every chunk."""
    _check_head(hidden, targets, weight, bias, scales)
    _check_range(targets, weight.shape[0])
    hidden, targets = hidden.contiguous(), targets.contiguous()
    offset = None if bias is None else bias.to(hidden.dtype).contiguous()
    buffer = empty((min(chunk_rows, hidden.shape[0]), weight.shape[0]), hidden.dtype)
    dx = empty_like(hidden) if need_dx else hidden.new_empty(0)
    total = 0.0
    for start in range(0, hidden.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = buffer[: hidden[rows].shape[0]]
        linear_into(logits, hidden[rows], weight, offset, scales)
        total += _loss_of(logits, targets[rows], write=need_dx)
        if need_dx:
            dx_into(dx[rows], logits, weight, scales)
    return torch.tensor(total, dtype=torch.float32), dx


@torch.library.register_fake("halfbyte::linear_cross_entropy")
def _linear_cross_entropy_fake(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int, need_dx: bool,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_head(hidden, targets, weight, bias, scales)
    dx = torch.empty_like(hidden) if need_dx else hidden.new_empty(0)
    return hidden.new_empty((), dtype=torch.float32), dx


def _save_dx(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1] if inputs[5] else None)


def _linear_cross_entropy_backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (dx,) = ctx.saved_tensors
    if dx is None:
        raise RuntimeError("linear_cross_entropy was called with need_dx=False: it has no gradient")
    return dx * grad_loss.to(dx.dtype), None, None, None, None, None, None


torch.library.register_autograd(
    "halfbyte::linear_cross_entropy", _linear_cross_entropy_backward, setup_context=_save_dx
)
