"""Proof, at the first steps, that the run learns: every adapter tensor has a gradient, and the logits move."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halfbyte.data import Batch
from halfbyte.errors import NumericsError
from halfbyte.model.trained_rows import rare_rows
from halfbyte.train.objective import Objective


class FirstStepCheck:
    """Watches steps 1 and 2. B starts at zero, so A's gradient is zero in step 1 and must appear in step 2.

    Args:
        batch: a batch whose loss is compared before and after the first update.
    """

    def __init__(self, model: nn.Module, objective: Objective, batch: Batch) -> None:
        rare = rare_rows(model)  # the samples of two steps may have none of their tokens
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in rare}
        self._model, self._objective, self._batch = model, objective, batch
        self._loss_before = self._loss()

    def after_backward(self, step: int) -> None:
        """Call before gradients are clipped or cleared.

        Raises:
            NumericsError: naming the tensors without a gradient.
        """
        if step > 2:
            return
        expected = [name for name in self._parameters if step == 2 or "lora_A" not in name]
        dead = [name for name in expected if not _has_gradient(self._parameters[name])]
        if dead:
            raise NumericsError(
                f"{len(dead)} of {len(expected)} adapter tensors got no gradient in step {step}", where="training",
                why="first " + ", ".join(_short(name) for name in dead[:5]),
                fix="Leave these layers out of lora.target_modules, or report the model's architecture",
            )  # fmt: skip

    def after_update(self, step: int) -> None:
        """Call after the optimizer's step.

        Raises:
            NumericsError: the first update changed nothing.
        """
        if step == 1 and torch.equal(self._loss(), self._loss_before):
            raise NumericsError(
                "the first step changed no output of the model", where="training",
                fix="Raise optim.lr, or report the model's architecture",
            )  # fmt: skip

    @torch.no_grad()
    def _loss(self) -> Tensor:
        was_training = self._model.training
        self._model.eval()
        loss = self._objective.loss_sum(self._batch)
        self._model.train(was_training)
        return loss


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.weight", "")
