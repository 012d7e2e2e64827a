"""What AdamW keeps of a parameter, and the update of a run of its elements, wherever its moments are.

A run begins at a multiple of BLOCKSIZE, so its update gives the bytes that the whole parameter's would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.kernels.adamw import BLOCKSIZE
from halfbyte.quant.blocks import num_blocks

LEAST_8BIT = 4096
"""Smaller parameters keep 32-bit moments, as in bitsandbytes: they take no memory and are often the sensitive ones."""

MOMENTS = {32: ("exp_avg", "exp_avg_sq"), 8: ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")}
"""Names beside `step`, in the order of the operators' arguments."""

RUN_ELEMENTS = 1 << 20
"""Elements of a parameter that is not contiguous float32 which are copied at a time."""


def bits_of(numel: int, bits: int) -> int:
    """Of the moments of a parameter with `numel` elements, where `bits` were asked for."""
    return 8 if bits == 8 and numel >= LEAST_8BIT else 32


def zero_moments(param: Tensor, bits: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Moments of a parameter before its first step: of its shape, but for the scales (ceil(n/256),)."""
    scales = (num_blocks(param.numel(), BLOCKSIZE),)
    return {
        name: torch.zeros(
            scales if name.endswith("absmax") else param.shape,
            dtype=torch.uint8 if bits == 8 and not name.endswith("absmax") else torch.float32,
            device=device or param.device,
        )
        for name in MOMENTS[bits]
    }


def saved_moments(param: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The moments in a saved state, float32 or uint8; tensors that have the right dtype are not copied.

    Raises:
        ValueError: it is not the state of AdamW and of such a parameter.
    """
    moments = zero_moments(param, 8 if "exp_avg_absmax" in state else 32, "meta")
    for name, wanted in moments.items():
        value = state.get(name)
        if (
            not isinstance(value, Tensor) or value.numel() != wanted.numel()
            or value.is_floating_point() != wanted.is_floating_point()
        ):  # fmt: skip
            found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else value
            raise ValueError(
                f"saved {name} is {found}, and AdamW's for a parameter {tuple(param.shape)} is {wanted.dtype}"
            )
        moments[name] = value.to(wanted.dtype)
    return moments


@dataclass(frozen=True)
class Run:
    """Elements `start` to `stop` of a flattened parameter; `start` is a multiple of BLOCKSIZE."""

    param: Tensor
    start: int
    stop: int

    def cut(self, moments: Mapping[str, Tensor]) -> list[Tensor]:
        """This run's part of the whole parameter's moments, flat, in the operators' order."""
        blocks = slice(self.start // BLOCKSIZE, num_blocks(self.stop, BLOCKSIZE))
        elements = slice(self.start, self.stop)
        names = MOMENTS[8 if "exp_avg_absmax" in moments else 32]
        return [moments[name].reshape(-1)[blocks if name.endswith("absmax") else elements] for name in names]

    def read(self, tensor: Tensor) -> Tensor:
        """This run's elements of a tensor of the parameter's shape: a view where it is contiguous, else a copy."""
        if tensor.is_contiguous():
            return tensor.view(-1)[self.start : self.stop]
        return tensor.take(self._places(tensor))

    def write(self, values: Tensor) -> None:
        """Round `values` (stop - start,) into the parameter."""
        if self.param.is_contiguous():
            self.param.view(-1)[self.start : self.stop].copy_(values)
        else:
            self.param.put_(self._places(self.param), values.to(self.param.dtype))

    def _places(self, tensor: Tensor) -> Tensor:
        return torch.arange(self.start, self.stop, device=tensor.device)


def is_exact(param: Tensor) -> bool:
    """Whether a parameter is updated in its place."""
    return param.dtype == torch.float32 and param.is_contiguous()


def runs_of(param: Tensor) -> list[Run]:
    """The whole parameter where it is updated in its place, else runs that bound the copies."""
    count = param.numel()
    length = max(count, 1) if is_exact(param) else RUN_ELEMENTS
    return [Run(param, start, min(start + length, count)) for start in range(0, count, length)]


def update(
    parts: Iterable[tuple[Run, list[Tensor]]], groups: Mapping[Tensor, dict[str, Any]], steps: Mapping[Tensor, int]
) -> None:
    """One step of runs with their moments, by one kernel call for all of one device, group, step and layout.

    Args:
        groups: each parameter's group.
        steps: the number of each parameter's step, from 1.
    """
    together: dict[tuple[torch.device, int, int, int], tuple[dict[str, Any], list[list[Tensor]]]] = {}
    rounded = []
    for run, moments in parts:
        param, group = run.param, groups[run.param]
        assert param.grad is not None
        exact, grad = run.read(param).float(), run.read(param.grad)
        page = [exact, grad if grad.dtype == torch.bfloat16 else grad.float(), *moments]
        together.setdefault((param.device, id(group), steps[param], len(page)), (group, []))[1].append(page)
        if not is_exact(param):
            rounded.append((run, exact))
    for (_, _, step, width), (group, pages) in together.items():
        operator = torch.ops.halfbyte.adamw_8bit_ if width == 6 else torch.ops.halfbyte.adamw_32bit_
        lists = [list(tensors) for tensors in zip(*pages, strict=True)]
        operator(*lists, group["lr"], *group["betas"], group["eps"], group["weight_decay"], step)
    for run, exact in rounded:
        run.write(exact)
