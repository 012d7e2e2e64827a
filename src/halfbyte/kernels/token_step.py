"""One token through all layers of a decoder in one native call: csrc/token_step.inl for Python.

Not an operator: a call writes into caches that its owner lets grow. `TokenStep` owns the structures, the caches and
references to every tensor that they point into.
"""

from __future__ import annotations

import ctypes as ct
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels import abi
from halfbyte.kernels.abi import DTYPES, KEY_BLOCK, NO_MEMORY, OK, WEIGHT_DTYPES
from halfbyte.kernels.cpu import WeightView
from halfbyte.kernels.gated import ACTIVATIONS
from halfbyte.kernels.registry import cpu_choice


@dataclass(frozen=True)
class Matrix:
    """A frozen linear layer (rows, cols), and the adapter on it.

    Attributes:
        weight: the library's view of a 4-bit weight, or a matrix in float32, bfloat16, float16, or int8 with `scales`.
        shape: (rows, cols).
        lora_A, lora_B: (rank, cols) and (rows, rank).
    """

    weight: WeightView | Tensor
    shape: tuple[int, int]
    bias: Tensor | None = None
    lora_A: Tensor | None = None  # noqa: N815 (PEFT's name)
    lora_B: Tensor | None = None  # noqa: N815
    scaling: float = 1.0
    scales: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """RMSNorm: ``x / sqrt(mean(x**2) + eps) * (offset + weight)``."""

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True)
class Layer:
    """What `hb_layer` says, but for the caches; the norms may be None where the C structure's may be empty."""

    input_norm: Norm
    q_norm: Norm | None
    k_norm: Norm | None
    post_attention_norm: Norm | None
    mlp_norm: Norm
    post_mlp_norm: Norm | None
    qkv: tuple[Matrix, ...]
    o: Matrix
    gate_up: tuple[Matrix, ...]
    down: Matrix
    activation: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int


class TokenStep:
    """Decodes token by token at batch 1. Positions 0 to `length` - 1 are in the caches.

    Args:
        cache_dtype: of keys and values, float32 or bfloat16; everything else is computed in float32.

    Raises:
        ValueError: the library does not serve, or does not know the case; the text is the reason.
    """

    def __init__(self, layers: list[Layer], final_norm: Norm, head: Matrix, *, cache_dtype: torch.dtype) -> None:
        choice = cpu_choice()
        if choice.library is None:
            raise ValueError(choice.reason)
        if not choice.library.fused_linear:
            raise ValueError(f"the kernels for {choice.library.isa} have no token step")
        self._library = choice.library
        self._kept: list[object] = []
        self._layers = (abi.Layer * len(layers))(*(self._layer(layer, cache_dtype) for layer in layers))
        self.vocab_size, self.hidden_size = head.shape
        self._decoder = abi.Decoder(
            ct.addressof(self._layers), len(layers), self.hidden_size, 0, self._norm(final_norm), self._matrix(head)
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

    def _layer(self, layer: Layer, cache_dtype: torch.dtype) -> abi.Layer:
        return abi.Layer(
            input_norm=self._norm(layer.input_norm), q_norm=self._norm(layer.q_norm), k_norm=self._norm(layer.k_norm),
            post_attention_norm=self._norm(layer.post_attention_norm), mlp_norm=self._norm(layer.mlp_norm),
            post_mlp_norm=self._norm(layer.post_mlp_norm),
            qkv=(abi.Matrix * 3)(*map(self._matrix, layer.qkv)), num_qkv=len(layer.qkv),
            gate_up=(abi.Matrix * 2)(*map(self._matrix, layer.gate_up)), num_gate_up=len(layer.gate_up),
            o=self._matrix(layer.o), down=self._matrix(layer.down), activation=ACTIVATIONS[layer.activation],
            heads=layer.heads, kv_heads=layer.kv_heads, head_dim=layer.head_dim, cache_dtype=DTYPES[cache_dtype],
            window=layer.window, scale=layer.scale,
        )  # fmt: skip

    def _norm(self, norm: Norm | None) -> abi.Norm:
        if norm is None:
            return abi.Norm()
        return abi.Norm(self._pointer(norm.weight.detach().float() + norm.offset, torch.float32), norm.eps)

    def _matrix(self, matrix: Matrix) -> abi.Matrix:
        weight = matrix.weight
        rank = 0 if matrix.lora_A is None else matrix.lora_A.shape[0]
        self._kept.append(weight)
        return abi.Matrix(
            w4=weight.pointer if isinstance(weight, WeightView) else None,
            dense=self._pointer(weight, weight.dtype) if isinstance(weight, Tensor) else None,
            dtype=WEIGHT_DTYPES[weight.dtype] if isinstance(weight, Tensor) else 0,
            scales=self._pointer(matrix.scales, torch.float32),
            bias=self._pointer(matrix.bias, torch.float32), lora_A=self._pointer(matrix.lora_A, torch.float32),
            lora_B=self._pointer(matrix.lora_B, torch.float32), rank=rank, rows=matrix.shape[0],
            cols=matrix.shape[1], scaling=matrix.scaling,
        )  # fmt: skip

    def _pointer(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().to(dtype).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _longer(cache: Tensor, size: int) -> Tensor:
    """`cache` with `size` entries along dimension 1."""
    longer = cache.new_empty(cache.shape[0], size, *cache.shape[2:])
    longer[:, : cache.shape[1]] = cache
    return longer
