"""AdamW with moments in 32 or 8 bits, over the paged operators of `kernels.adamw`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.kernels.adamw import BLOCKSIZE
from halfbyte.quant.blocks import num_blocks

LEAST_8BIT = 4096
"""Smaller parameters keep 32-bit moments, as in bitsandbytes: they take no memory and are often the sensitive ones."""

_MOMENTS = {32: ("exp_avg", "exp_avg_sq"), 8: ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")}
"""What a parameter's state holds beside `step`, in the order of the operators' arguments."""


class AdamW(Optimizer):
    """Decoupled weight decay (arXiv 1711.05101) with bias correction.

    A state holds the number `step` and, of the parameter's shape, `exp_avg` and `exp_avg_sq`: torch's names, float32.
    With 8 bits these two are uint8 codes, and `exp_avg_absmax` and `exp_avg_sq_absmax` (ceil(n/256),) their scales.
    A 16-bit parameter is updated in fp32, one tensor at a time, and rounded once.

    With 32 bits it is `torch.optim.AdamW` but for the order of rounding; see docs/numerics.md for the distance.

    Args:
        params: parameters or groups; float32, bfloat16 or float16.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: lr * weight_decay of the parameter is taken off at every step.
        bits: 32, or 8 for a quarter of the memory. Like the others it belongs to a group, is saved with the state and
            comes back with it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: int = 32,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay} is out of range")
        if bits not in _MOMENTS:
            raise ValueError(f"bits={bits}: choose 32 or 8")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": bits})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("bits", 32)  # saved before there was a choice

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns what `closure` returns.

        Raises:
            ValueError: a gradient is sparse, or a parameter neither float32 nor 16-bit.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            together: dict[tuple[torch.device, int, int], list[list[Tensor]]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise ValueError("AdamW takes no sparse gradients")
                state = self._state_of(param, group["bits"])
                state["step"] += 1
                moments = [state[name] for name in _MOMENTS[8 if "exp_avg_absmax" in state else 32]]
                grad = param.grad if param.grad.dtype == torch.bfloat16 else param.grad.float()
                if param.dtype == torch.float32 and param.is_contiguous():
                    page = [param, grad.contiguous(), *moments]
                    together.setdefault((param.device, state["step"], len(page)), []).append(page)
                    continue
                exact = param.float().contiguous()
                _update([[exact, grad.contiguous(), *moments]], group, state["step"])
                param.copy_(exact)
            for (_, step, _), pages in together.items():
                _update(pages, group, step)
        return loss

    def _state_of(self, param: Tensor, bits: int) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if state:
            return state
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"AdamW takes float32 and 16-bit parameters, not {param.dtype}")
        state["step"] = 0
        eight = bits == 8 and param.numel() >= LEAST_8BIT
        for name in _MOMENTS[8 if eight else 32]:
            if name.endswith("absmax"):
                state[name] = torch.zeros(num_blocks(param.numel(), BLOCKSIZE), device=param.device)
            else:
                dtype = torch.uint8 if eight else torch.float32
                state[name] = torch.zeros(param.shape, dtype=dtype, device=param.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that states keep their dtype beside 16-bit parameters, and are copies."""
        super().load_state_dict(state_dict)
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name == "step":
                    self.state[param][name] = int(value)
                    continue
                dtype = torch.uint8 if value.dtype == torch.uint8 else torch.float32
                self.state[param][name] = value.to(param.device, dtype, copy=True).contiguous()


def _update(pages: list[list[Tensor]], group: dict[str, Any], step: int) -> None:
    """One kernel call for pages (param, grad, *moments) of one device and one layout."""
    lists = [list(tensors) for tensors in zip(*pages, strict=True)]
    operator = torch.ops.halfbyte.adamw_8bit_ if len(lists) == 6 else torch.ops.halfbyte.adamw_32bit_
    operator(*lists, group["lr"], *group["betas"], group["eps"], group["weight_decay"], step)
