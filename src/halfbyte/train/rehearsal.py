"""The largest batch first, and only to see that it fits: an overrun shows in the first minute and not after hours."""

from __future__ import annotations

import torch

from halfbyte.checkpoint import capture_rng, restore_rng
from halfbyte.data import make_batch
from halfbyte.train.setup import Run


def rehearse(run: Run) -> int:
    """Forward and backward of the run's largest batch, beside the optimizer's states and, with accumulation,
    gradients: as full as memory will ever be. Random states, gradients and parameters are as before.

    Returns:
        The batch's tokens.
    """
    rng = capture_rng()
    was_training = run.model.training
    run.model.train()
    run.optimizer.reserve()
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    if run.config.train.gradient_accumulation_steps > 1:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    batch = make_batch(run.data, run.worst.samples)
    streamed = run.loaded.store is not None  # then all micro-batches of a step pass a layer together
    count = run.config.train.gradient_accumulation_steps if streamed else 1
    losses = run.objective.loss_sums([batch] * count)
    torch.autograd.backward([loss / batch.num_targets for loss in losses])
    for parameter in parameters:
        parameter.grad = None
    run.model.train(was_training)
    restore_rng(rng)
    return batch.num_tokens
