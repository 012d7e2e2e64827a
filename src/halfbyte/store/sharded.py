"""Frozen layers of which every rank holds a part; FSDP2 gathers a layer's bytes from all of them while it computes.

What travels is what lies in the files, 4-bit codes and scales; they are decoded after that, by the same kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

ALIGNMENT = 64
"""Of each tensor within its layer's bytes."""


class _Bytes(nn.Module):
    """A layer's tensors end to end: the parameter that FSDP2 shards."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.sizes = [tensor.numel() for tensor in tensors]
        starts = [0]
        for size in self.sizes:
            starts.append(-(-(starts[-1] + size) // ALIGNMENT) * ALIGNMENT)
        self.starts = starts[:-1]
        packed = tensors[0].new_zeros(starts[-1])
        for start, tensor in zip(self.starts, tensors, strict=True):
            packed[start : start + tensor.numel()] = tensor
        self.packed = nn.Parameter(packed, requires_grad=False)

    @property
    def tensors(self) -> list[Tensor]:
        """The parts of the gathered whole."""
        return [self.packed[start : start + size] for start, size in zip(self.starts, self.sizes, strict=True)]


class ShardedStore:
    """The bytes of some layers, whole in memory only while they are used or about to be.

    All ranks must use the same layers in the same order: gathering is work of all of them.

    Args:
        layers: each layer's tensors, flat uint8, asked for one layer at a time; not kept.
        mesh: the ranks, in one dimension.
    """

    def __init__(self, layers: Iterable[Sequence[Tensor]], mesh: DeviceMesh) -> None:
        self._layers: list[_Bytes] = []
        self.stored_bytes = 0
        """Of all layers, gathered."""
        for tensors in layers:
            whole = _Bytes(tensors)
            self.stored_bytes += whole.packed.nbytes
            self._layers.append(cast(_Bytes, fully_shard(whole, mesh=mesh)))
        self._world = mesh.size()
        self._ahead: tuple[int, Any] | None = None

    @property
    def nbytes(self) -> int:
        """What this rank holds of them."""
        return -(-self.stored_bytes // self._world)

    @contextmanager
    def use(self, layer: int, *, backward: bool = False, turns: bool = False) -> Iterator[list[Tensor]]:
        """The tensors of `layer` as flat uint8, valid inside the block only; the next one comes meanwhile.

        Args:
            layer: its number.
            backward: whether this pass goes down.
            turns: of no use here: the layer at the turn is gathered twice.
        """
        self._gather(layer)
        following = layer + (-1 if backward else 1)
        if 0 <= following < len(self._layers):
            self._ahead = following, self._fsdp(following).unshard(async_op=True)
        try:
            yield self._layers[layer].tensors
        finally:
            self._fsdp(layer).reshard()

    def shrink(self) -> int:
        """0: there is nothing that one rank could give back alone."""
        return 0

    def _gather(self, layer: int) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            number, handle = ahead
            handle.wait()
            if number == layer:
                return
            self._fsdp(number).reshard()  # guessed wrongly, on all ranks alike
        self._fsdp(layer).unshard()

    def _fsdp(self, layer: int) -> FSDPModule:
        return cast(FSDPModule, self._layers[layer])
