"""One token through all layers of a decoder in one native call: csrc/token_step.inl for Python.

Not an operator: a call writes into caches that its owner lets grow. `TokenStep` owns the structures, the caches and
references to every tensor that they point into.
"""

from __future__ import annotations

import ctypes as ct

import torch
from torch import Tensor

from halfbyte.kernels import abi
from halfbyte.kernels.abi import KEY_BLOCK, NO_MEMORY, OK
from halfbyte.kernels.decoder_structures import Layer, Matrix, Norm, Structures, step_library


class TokenStep:
    """Decodes token by token at batch 1. Positions 0 to `length` - 1 are in the caches.

    Args:
        cache_dtype: of keys and values, float32 or bfloat16; everything else is computed in float32.

    Raises:
        ValueError: the library does not serve, or does not know the case; the text is the reason.
    """

    def __init__(self, layers: list[Layer], final_norm: Norm, head: Matrix, *, cache_dtype: torch.dtype) -> None:
        self._library = step_library()
        self._structures = Structures()
        self._layers = (abi.Layer * len(layers))(*(self._structures.layer(layer, cache_dtype) for layer in layers))
        self.vocab_size, self.hidden_size = head.shape
        self._decoder = abi.Decoder(
            ct.addressof(self._layers),
            len(layers),
            self.hidden_size,
            0,
            self._structures.norm(final_norm),
            self._structures.matrix(head),
        )
        self._cache_dtype = cache_dtype
        self._caches: list[tuple[Tensor, Tensor]] = [
            (torch.empty(layer.kv_heads, 0, layer.head_dim, KEY_BLOCK, dtype=cache_dtype),
             torch.empty(layer.kv_heads, 0, layer.head_dim, dtype=cache_dtype))
            for layer in layers
        ]  # fmt: skip
        self._turns: list[tuple[Tensor, Tensor]] = []
        self.length = 0

    @property
    def capacity(self) -> int:
        """Positions that the caches have room for."""
        return int(self._decoder.capacity)

    def reserve(self, capacity: int, turns: list[tuple[Tensor, Tensor]]) -> None:
        """Make room for `capacity` positions, keeping what is there.

        Args:
            turns: cosines and sines of each layer, (at least `capacity`, rotary_dim) each.
        """
        capacity = -(-capacity // KEY_BLOCK) * KEY_BLOCK
        self._turns = []
        for index, (cos, sin) in enumerate(turns):
            cos, sin = cos.float().contiguous(), sin.float().contiguous()
            keys, values = (_longer(cache, size) for cache, size in zip(
                self._caches[index], (capacity // KEY_BLOCK, capacity), strict=True
            ))  # fmt: skip
            assert cos.shape[0] >= capacity
            layer = self._layers[index]
            layer.cos, layer.sin, layer.rotary_dim = cos.data_ptr(), sin.data_ptr(), cos.shape[1]
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
            self._turns.append((cos, sin))
            self._caches[index] = (keys, values)
        self._decoder.capacity = capacity

    def fill(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Positions 0 and on of layer `index`: rotated keys, and values, (kv_heads, positions, head_dim)."""
        to_keys, to_values = self._caches[index]
        kv_heads, count, features = keys.shape
        to_values[:, :count] = values
        whole = count // KEY_BLOCK
        blocks = keys[:, : whole * KEY_BLOCK].reshape(kv_heads, whole, KEY_BLOCK, features)
        to_keys[:, :whole] = blocks.transpose(2, 3)
        if rest := count - whole * KEY_BLOCK:
            to_keys[:, whole, :, :rest] = keys[:, whole * KEY_BLOCK :].transpose(1, 2)

    def step(self, x: Tensor) -> Tensor:
        """Logits (vocab_size,) float32 after the token with embedding `x` (hidden_size,), which joins the caches."""
        x = x.reshape(-1).float().contiguous()
        if x.numel() != self.hidden_size or self.length >= self.capacity:
            raise ValueError(f"{x.numel()} numbers for {self.hidden_size}, position {self.length} of {self.capacity}")
        logits = torch.empty(self.vocab_size)
        status = self._library.call.hb_token_step(
            ct.addressof(self._decoder), self.length, x.data_ptr(), logits.data_ptr(), torch.get_num_threads()
        )
        if status == NO_MEMORY:
            raise MemoryError
        if status != OK:
            raise ValueError("the native token step does not know these shapes")
        self.length += 1
        return logits


def _longer(cache: Tensor, size: int) -> Tensor:
    """`cache` with `size` entries along dimension 1."""
    longer = cache.new_empty(cache.shape[0], size, *cache.shape[2:])
    longer[:, : cache.shape[1]] = cache
    return longer
