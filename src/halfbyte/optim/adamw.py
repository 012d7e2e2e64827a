"""AdamW with moments in 32 or 8 bits, in tensors or in pages, over the operators of `kernels.adamw`."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from halfbyte.dtypes import parse_bytes
from halfbyte.optim.moments import MOMENTS, bits_of, is_exact, runs_of, saved_moments, update, zero_moments
from halfbyte.optim.paged import LEAST_BUDGET, NO_LIMIT, PagedMoments


class AdamW(Optimizer):
    """Decoupled weight decay (arXiv 1711.05101) with bias correction.

    A state holds the number `step` and, of the parameter's shape, `exp_avg` and `exp_avg_sq`: torch's names, float32.
    With 8 bits these two are uint8 codes, and `exp_avg_absmax` and `exp_avg_sq_absmax` (ceil(n/256),) their scales.
    A 16-bit parameter is updated in fp32, a run of elements at a time, and rounded once.

    With 32 bits it is `torch.optim.AdamW` but for the order of rounding; see docs/numerics.md for the distance.

    Args:
        params: parameters or groups; float32, bfloat16 or float16.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: lr * weight_decay of the parameter is taken off at every step.
        bits: 32, or 8 for a quarter of the memory. Like the others it belongs to a group, is saved with the state and
            comes back with it.
        paged: keep the moments in pages, `budget` bytes of them in memory and the rest on disk. The results are the
            same to the bit, and so is what `state_dict` gives, so paged and unpaged runs resume each other. `state`
            holds the number `step` only. All parameters are on one device.
        budget: bytes, or a size like "1GB" or "512MiB"; at least 8192, by default 1GB. On a GPU it is of its memory.
        host_budget: likewise, what a GPU's moments may take of host memory before the disk; None is no limit.
        offload_dir: the folder of the scratch file, which has no name in it and goes with the process; "" is /var/tmp.
    """

    _paging: tuple[int, int, str | Path] | None = None
    _pages: PagedMoments | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: int = 32,
        *,
        paged: bool = False,
        budget: int | str | None = None,
        host_budget: int | str | None = None,
        offload_dir: str | Path = "",
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay} is out of range")
        if bits not in MOMENTS:
            raise ValueError(f"bits={bits}: choose 32 or 8")
        if paged:
            host = NO_LIMIT if host_budget is None else parse_bytes(host_budget)
            budget = "1GB" if budget is None else budget
            self._paging = parse_bytes(budget), host, offload_dir or _scratch_folder()
            if self._paging[0] < LEAST_BUDGET:
                raise ValueError(f"budget={budget!r}: at least {LEAST_BUDGET} bytes, which is two pages")
        elif budget is not None or host_budget is not None or offload_dir:
            raise ValueError("budget, host_budget and offload_dir are of paged moments: give paged=True")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": bits})

    def __getstate__(self) -> dict[str, Any]:
        if self._paging:
            raise TypeError("a paged AdamW is not copied or pickled: part of it is on disk. Use state_dict()")
        return super().__getstate__()

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
        groups = {param: group for group in self.param_groups for param in group["params"] if param.grad is not None}
        for param in groups:
            if param.grad.is_sparse:
                raise ValueError("AdamW takes no sparse gradients")
        self._begin({param: group["bits"] for param, group in groups.items()})
        steps = {}
        for param in groups:
            self.state[param]["step"] += 1
            steps[param] = self.state[param]["step"]
        if self._pages is not None:
            for parts in self._pages.sweep(groups):
                update(parts, groups, steps)
            return loss
        runs = [run for param in groups for run in runs_of(param)]
        parts = [(run, run.cut(self.state[run.param])) for run in runs]
        update([part for part in parts if is_exact(part[0].param)], groups, steps)
        for part in parts:  # the others one by one: they are copied on the way
            if not is_exact(part[0].param):
                update([part], groups, steps)
        return loss

    def reserve(self) -> str:
        """Take the memory, and of a paged one the disk, for all parameters now rather than at their first step.

        Returns:
            Where the moments are, in words.

        Raises:
            ResourceError: the disk has no room, or refuses.
        """
        params = {p: group["bits"] for group in self.param_groups for p in group["params"] if p.requires_grad}
        self._begin(params)
        return str(self._pages) if self._pages is not None else "in memory"

    def _begin(self, params: dict[Tensor, int]) -> None:
        """Give zeros to those of `params` that have no moments yet; the bits are those of their group."""
        new = {param: bits_of(param.numel(), bits) for param, bits in params.items() if not self.state.get(param)}
        for param in new:
            if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"AdamW takes float32 and 16-bit parameters, not {param.dtype}")
        if self._paging and new:
            if self._pages is None:
                self._pages = PagedMoments(next(iter(new)).device, *self._paging)
            self._pages.place(new)
        for param, bits in new.items():
            self.state[param] = {"step": 0} | ({} if self._paging else zero_moments(param, bits))

    def state_dict(self) -> dict[str, Any]:
        """As torch's. A paged one's moments are put together in tensors: in host memory, all of them."""
        if self._pages is None:
            return super().state_dict()
        kept = self.state
        full = {p: state | zero_moments(p, self._pages.bits(p), "cpu") for p, state in kept.items()}
        self.state = defaultdict(dict, full)
        try:
            for parts in self._pages.sweep(kept, write=False):
                for run, moments in parts:
                    for whole, part in zip(run.cut(full[run.param]), moments, strict=True):
                        whole.copy_(part)
            return super().state_dict()
        finally:
            self.state = kept

    def streamed_state_dict(self) -> dict[str, Any]:
        """As `state_dict`, but a paged one's moments are `Pieces`, to be read before the next step."""
        packed = super().state_dict()
        if self._pages is not None:
            for saved, group in zip(packed["param_groups"], self.param_groups, strict=True):
                for number, param in zip(saved["params"], group["params"], strict=True):
                    if number in packed["state"]:
                        packed["state"][number] = packed["state"][number] | self._pages.pieces(param)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that states keep their dtype beside 16-bit parameters, and are copies.

        Raises:
            ValueError: the state is not one of these parameters, or not AdamW's.
        """
        super().load_state_dict(state_dict | {"state": {}})  # it would cast moments to the parameters' dtype
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        states = {param: state_dict["state"].get(number) for number, param in zip(numbers, params, strict=True)}
        saved = {param: saved_moments(param, state) for param, state in states.items() if state}
        self._pages = None  # before there is another one
        for param, moments in saved.items():
            self.state[param] = {"step": int(states[param]["step"])}
            if not self._paging:
                self.state[param] |= {
                    name: value.to(param.device, copy=True).contiguous() for name, value in moments.items()
                }
        if self._paging and saved:
            self._pages = PagedMoments(params[0].device, *self._paging)
            self._pages.place({param: 8 if "exp_avg_absmax" in moments else 32 for param, moments in saved.items()})
            for parts in self._pages.sweep(saved):
                for run, into in parts:
                    for part, value in zip(into, run.cut(saved[run.param]), strict=True):
                        part.copy_(value)


def _scratch_folder() -> str:
    """Where large temporary files belong: /tmp may be memory."""
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
