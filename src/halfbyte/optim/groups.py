"""Parameter groups for LoRA+ (arXiv 2402.12354): B learns faster than A."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter


def lora_param_groups(
    named_params: Iterable[tuple[str, Parameter]], lr: float, lr_b_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: the `lora_B` matrices at `lr * lr_b_ratio`, everything else at `lr`.

    Parameters that need no gradient are left out, and so is an empty group. The order within a group is that of
    `named_params`. Each group carries `lr_ratio`, so that a schedule sets `group["lr"] = rate * group["lr_ratio"]`.
    """
    a: list[Parameter] = []
    b: list[Parameter] = []
    for name, parameter in named_params:
        if parameter.requires_grad:
            (b if "lora_B" in name.split(".") else a).append(parameter)
    return [
        {"params": params, "lr": lr * ratio, "lr_ratio": ratio, "weight_decay": weight_decay}
        for params, ratio in ((a, 1.0), (b, lr_b_ratio))
        if params
    ]
