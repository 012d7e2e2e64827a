"""Layers that read the same input, and what the native library sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels import abi
from halfbyte.kernels.abi import DTYPES
from halfbyte.kernels.buffers import empty_like
from halfbyte.kernels.cpu import Library, WeightView
from halfbyte.kernels.panel import Weight


class Member(NamedTuple):
    """One layer: its weight (out_features, in_features) and its adapter (rank, in_features), (out_features, rank)."""

    weight: Weight
    out_features: int
    bias: Tensor | None = None
    lora_A: Tensor | None = None  # noqa: N815
    lora_B: Tensor | None = None  # noqa: N815
    scaling: float = 0.0

    @property
    def rank(self) -> int:
        """Of the adapter; 0 without one."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class GroupView:
    """Layers as the library sees them, their shapes checked before. Keeps alive the tensors it points into.

    Args:
        grads: (dA, dB) of the members with an adapter, in their order, float32 and contiguous, for `linear_backward`.
    """

    def __init__(
        self, members: Sequence[Member], in_features: int, dtype: torch.dtype,
        grads: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:  # fmt: skip
        self._kept: list[object] = [grads]
        self._structs = (abi.Member * len(members))()
        remaining = iter(grads)
        for struct, member in zip(self._structs, members, strict=True):
            view = WeightView(*member.weight, (member.out_features, in_features))
            bias = None if member.bias is None else member.bias.to(dtype).contiguous()
            a, b = (None if t is None else t.contiguous() for t in (member.lora_A, member.lora_B))
            grad_a, grad_b = next(remaining, (None, None)) if member.rank else (None, None)
            self._kept += (view, bias, a, b)
            struct.weight = view.struct
            struct.bias, struct.lora_A, struct.lora_B = _pointer(bias), _pointer(a), _pointer(b)
            struct.grad_A, struct.grad_B = _pointer(grad_a), _pointer(grad_b)
            struct.rank, struct.scaling = member.rank, member.scaling

    def linear(self, library: Library, x: Tensor, y: Tensor, u: Tensor | None) -> int:
        """Fills y (m, all out_features) and u (m, all ranks); contiguous. Returns the library's status."""
        status = library.call.hb_linear(
            self._structs, len(self._structs), x.data_ptr(), DTYPES[x.dtype], x.shape[0], y.data_ptr(), _pointer(u),
            torch.get_num_threads(),
        )  # fmt: skip
        return int(status)

    def linear_backward(
        self, library: Library, g: Tensor, x: Tensor | None, u: Tensor | None, dx: Tensor | None
    ) -> int:
        """Fills dx (m, in_features), if given, and the gradients of the adapters. Returns the library's status."""
        v = None if u is None else empty_like(u)
        status = library.call.hb_linear_backward(
            self._structs, len(self._structs), g.data_ptr(), _pointer(x), _pointer(u), DTYPES[g.dtype], g.shape[0],
            _pointer(dx), _pointer(v), torch.get_num_threads(),
        )  # fmt: skip
        return int(status)
