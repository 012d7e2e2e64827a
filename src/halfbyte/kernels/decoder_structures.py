"""A decoder as the native library sees it: what its layers are, and the structures of csrc/halfbyte.h for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels import abi
from halfbyte.kernels.abi import DTYPES, WEIGHT_DTYPES
from halfbyte.kernels.cpu import Library, WeightView
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


def step_library() -> Library:
    """The library whose steps serve. Raises ValueError, the text the reason, where there is none."""
    choice = cpu_choice()
    if choice.library is None:
        raise ValueError(choice.reason)
    if not choice.library.fused_linear:
        raise ValueError(f"the kernels for {choice.library.isa} have no token step")
    return choice.library


class Structures:
    """Makes the library's structures; `kept` are the tensors that they point into."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def layer(self, layer: Layer, cache_dtype: torch.dtype) -> abi.Layer:
        return abi.Layer(
            input_norm=self.norm(layer.input_norm), q_norm=self.norm(layer.q_norm), k_norm=self.norm(layer.k_norm),
            post_attention_norm=self.norm(layer.post_attention_norm), mlp_norm=self.norm(layer.mlp_norm),
            post_mlp_norm=self.norm(layer.post_mlp_norm),
            qkv=(abi.Matrix * 3)(*map(self.matrix, layer.qkv)), num_qkv=len(layer.qkv),
            gate_up=(abi.Matrix * 2)(*map(self.matrix, layer.gate_up)), num_gate_up=len(layer.gate_up),
            o=self.matrix(layer.o), down=self.matrix(layer.down), activation=ACTIVATIONS[layer.activation],
            heads=layer.heads, kv_heads=layer.kv_heads, head_dim=layer.head_dim, cache_dtype=DTYPES[cache_dtype],
            window=layer.window, scale=layer.scale,
        )  # fmt: skip

    def norm(self, norm: Norm | None) -> abi.Norm:
        if norm is None:
            return abi.Norm()
        return abi.Norm(self.pointer_to(norm.weight.detach().float() + norm.offset, torch.float32), norm.eps)

    def matrix(self, matrix: Matrix) -> abi.Matrix:
        weight = matrix.weight
        rank = 0 if matrix.lora_A is None else matrix.lora_A.shape[0]
        self.kept.append(weight)
        return abi.Matrix(
            w4=weight.pointer if isinstance(weight, WeightView) else None,
            dense=self.pointer_to(weight, weight.dtype) if isinstance(weight, Tensor) else None,
            dtype=WEIGHT_DTYPES[weight.dtype] if isinstance(weight, Tensor) else 0,
            scales=self.pointer_to(matrix.scales, torch.float32),
            bias=self.pointer_to(matrix.bias, torch.float32), lora_A=self.pointer_to(matrix.lora_A, torch.float32),
            lora_B=self.pointer_to(matrix.lora_B, torch.float32), rank=rank, rows=matrix.shape[0],
            cols=matrix.shape[1], scaling=matrix.scaling,
        )  # fmt: skip

    def pointer_to(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        """Where `tensor` lies, as a contiguous one of `dtype`."""
        if tensor is None:
            return None
        tensor = tensor.detach().to(dtype).contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()
