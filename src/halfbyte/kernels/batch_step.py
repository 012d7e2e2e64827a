"""Tokens of several sequences through all layers in one native call: csrc/batch_step.inl for Python.

A row's logits depend on its sequence and its adapter alone, to the bit: neither on the other rows of a call, nor on
how a prompt was cut into calls. `BatchStep` owns the pool of cache blocks; its caller says who uses which of them.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels import abi
from halfbyte.kernels.abi import ADAPTED, DTYPES, KEY_BLOCK, NO_MEMORY, OK
from halfbyte.kernels.buffers import empty
from halfbyte.kernels.decoder_structures import Layer, Matrix, Norm, Structures, step_library

MATRICES = ADAPTED
BLOCK = KEY_BLOCK
"""Positions in a block of the cache."""
_B_ROWS = 16
_LINE = 32
"""Elements that begin with a cache line."""


@dataclass(frozen=True)
class LowRank:
    """An adapter on one matrix: A (rank, cols), B (rows, rank), any float dtype; computed in float32."""

    lora_A: Tensor  # noqa: N815 (PEFT's name)
    lora_B: Tensor  # noqa: N815
    scaling: float


class Adapter:
    """An adapter in the library's layout, in one piece of memory.

    Args:
        layers: for each layer its `MATRICES` places, None where there is nothing.
        dtype: that it is kept in, float32 or bfloat16.
    """

    def __init__(self, layers: Sequence[Sequence[LowRank | None]], dtype: torch.dtype = torch.float32) -> None:
        places = [low for layer in layers for low in layer]
        assert len(places) == len(layers) * MATRICES
        self._array = (abi.LowRank * len(places))()
        self._memory = empty((sum(_elements(low) for low in places if low is not None),), dtype)
        self.pointer = ct.addressof(self._array)
        at = 0
        for struct, low in zip(self._array, places, strict=True):
            if low is None:
                continue
            rows, rank = low.lora_B.shape
            blocks = torch.zeros(_aligned(rows, _B_ROWS), rank)
            blocks[:rows] = low.lora_B
            struct.A = self._put(low.lora_A.flatten(), at)
            struct.B = self._put(blocks.view(-1, _B_ROWS, rank).transpose(1, 2).flatten(), at + _A_elements(low))
            struct.rank, struct.scaling, struct.dtype = rank, low.scaling, DTYPES[dtype]
            at += _elements(low)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def _put(self, values: Tensor, at: int) -> int:
        """The address of `values` in our memory, from element `at` on."""
        part = self._memory[at : at + values.numel()]
        part.copy_(values)
        return part.data_ptr()


def _aligned(count: int, to: int) -> int:
    return -(-count // to) * to


def _A_elements(low: LowRank) -> int:  # noqa: N802
    return _aligned(low.lora_A.numel(), _LINE)


def _elements(low: LowRank) -> int:
    """That both matrices take, each from the begin of a cache line on."""
    rows, rank = low.lora_B.shape
    return _A_elements(low) + _aligned(_aligned(rows, _B_ROWS) * rank, _LINE)


@dataclass(frozen=True)
class Row:
    """One token: its place in its sequence, the sequence's blocks (int32, contiguous), its adapter or None."""

    position: int
    blocks: Tensor
    adapter: Adapter | None


class BatchStep:
    """Computes rows of several sequences at once.

    Args:
        layers: without adapters of their own.
        turns: cosines and sines of each layer, (positions, rotary_dim) each; as many as a sequence may be long.
        num_blocks: of `BLOCK` positions each, in the cache.
        cache_dtype: of keys and values, float32 or bfloat16; everything else is computed in float32.

    Raises:
        ValueError: the library does not serve; the text is the reason.
    """

    def __init__(
        self, layers: list[Layer], final_norm: Norm, head: Matrix, *, turns: list[tuple[Tensor, Tensor]],
        num_blocks: int, cache_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._library = step_library()
        self._structures = Structures()
        structs = [self._structures.layer(layer, cache_dtype) for layer in layers]
        # Memory is taken as blocks are first used: nothing is written here.
        shapes = [(num_blocks, layer.kv_heads, BLOCK * layer.head_dim) for layer in layers]
        self._caches = [torch.empty(2, *shape, dtype=cache_dtype) for shape in shapes]
        for struct, cache, (cos, sin) in zip(structs, self._caches, turns, strict=True):
            struct.keys, struct.values = cache[0].data_ptr(), cache[1].data_ptr()
            struct.cos, struct.sin = (self._structures.pointer_to(turn, torch.float32) for turn in (cos, sin))
            struct.rotary_dim = cos.shape[1]
        self._layers = (abi.Layer * len(structs))(*structs)
        self.vocab_size, self.hidden_size = head.shape
        self.capacity = min(cos.shape[0] for cos, _ in turns)
        self.num_blocks = num_blocks
        self._decoder = abi.Decoder(
            ct.addressof(self._layers), len(layers), self.hidden_size, self.capacity,
            self._structures.norm(final_norm), self._structures.matrix(head),
        )  # fmt: skip

    def run(self, rows: Sequence[Row], x: Tensor, wanted: Sequence[int]) -> Tensor:
        """Take in a token each, and give logits after some of them.

        Args:
            rows: those of one sequence in the order of their positions; rows of one adapter are best neighbours.
            x: (rows, hidden_size) embeddings.
            wanted: rows whose logits are wanted.

        Returns:
            (wanted, vocab_size) float32.
        """
        x = x.float().contiguous()
        fits = all(row.blocks.dtype == torch.int32 and row.blocks.numel() * BLOCK > row.position for row in rows)
        if tuple(x.shape) != (len(rows), self.hidden_size) or not fits:
            raise ValueError(f"embeddings {tuple(x.shape)} for {len(rows)} rows, or blocks that end before a position")
        structs = (abi.Row * len(rows))(
            *(abi.Row(r.position, r.blocks.data_ptr(), r.adapter.pointer if r.adapter else None) for r in rows)
        )
        chosen = (ct.c_int64 * len(wanted))(*wanted)
        logits = empty((len(wanted), self.vocab_size), torch.float32)
        batch = abi.Batch(
            ct.addressof(structs), len(rows), self.num_blocks, x.data_ptr(), ct.addressof(chosen), len(wanted),
            logits.data_ptr(),
        )  # fmt: skip
        status = self._library.call.hb_batch_step(
            ct.addressof(self._decoder), ct.addressof(batch), torch.get_num_threads()
        )
        if status == NO_MEMORY:
            raise MemoryError
        if status != OK:
            raise ValueError("the native batch step does not know these shapes")
        return logits
