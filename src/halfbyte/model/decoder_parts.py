"""What a transformers decoder is made of, read off its modules for the native steps."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels.cpu import WeightView
from halfbyte.kernels.decoder_structures import Layer, Matrix
from halfbyte.kernels.decoder_structures import Norm as StepNorm
from halfbyte.kernels.registry import cpu_choice
from halfbyte.nn import Linear4bit
from halfbyte.nn.layer_spec import LayerSpec, Norm, Projection, describe, projection, rms_norm
from halfbyte.quant.int8 import int8_rows

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits between the two ways, as a part of the largest logit. transformers computes in the
model's dtype, we in float32. Measured over the tiny models of tests/model/test_decode.py, with and without adapter, on
12 tokens: 1e-5, 1e-2, and up to 0.17 in bfloat16, whose rounding such models enlarge; more goes to transformers."""
INTEGER_TOLERANCE = 1e-2
"""At least this with AVX2, which multiplies 16-bit integers (csrc/avx2_dot_one.inl). Measured over the same models: up
to 2.4e-3; over SmolLM2-135M below 1e-4."""


class NotCoveredError(Exception):
    """Why transformers has to generate."""


@dataclass(frozen=True)
class DecoderParts:
    """A decoder as the native steps take it.

    Attributes:
        causal: the transformers model.
        layers, final_norm, head: with the adapter that is active on the model, if there is one.
        modules: for each layer its linear layers at the places of an adapter (q, k, v, o, gate, up, down), None where
            one layer holds several of them.
        embed: token ids -> embeddings.
        dtype: of the model's activations.
        context: positions that the model was made for.
    """

    causal: Any
    layers: list[Layer]
    final_norm: StepNorm
    head: Matrix
    modules: list[tuple[nn.Module | None, ...]]
    embed: nn.Module
    dtype: torch.dtype
    context: int
    rotary: Any
    layer_types: list[str | None]

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @property
    def tolerance(self) -> float:
        library = cpu_choice().library
        integers = library is not None and library.isa == "avx2"
        return max(TOLERANCE[self.dtype], INTEGER_TOLERANCE if integers else 0.0)

    def turns(self, positions: int) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of each layer, (positions, rotary_dim) each."""
        by_type = _takes_layer_type(self.rotary)
        numbers = torch.arange(positions).unsqueeze(0)
        like = torch.empty(1, dtype=torch.float32)
        kinds = {kind: self.rotary(like, numbers, **({"layer_type": kind} if by_type else {}))
                 for kind in set(self.layer_types if by_type else [None])}  # fmt: skip
        turns = [kinds[kind if by_type else None] for kind in self.layer_types]
        return [(cos[0], sin[0]) for cos, sin in turns]


def decoder_parts(model: Any) -> DecoderParts:
    """Raises NotCoveredError: the model has something that the native steps do not compute."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner: Any = getattr(causal, getattr(causal, "base_model_prefix", ""), None)
    layers, rotary = getattr(inner, "layers", None), getattr(inner, "rotary_emb", None)
    final_norm = rms_norm(inner.norm) if hasattr(inner, "norm") else None
    if layers is None or rotary is None or final_norm is None:
        raise NotCoveredError("it is not built as layers with rotary positions and a norm after them")
    if final_norm.weight.device.type != "cpu":
        raise NotCoveredError("it is on a GPU")
    if any(hasattr(layer, "streamed") for layer in layers):
        raise NotCoveredError("its layers are streamed")
    _takes_layer_type(rotary)
    specs = [describe(layer) for layer in layers]
    head = _matrix(causal.get_output_embeddings(), "the output head")
    return DecoderParts(
        causal=causal, layers=[_layer(spec, f"layer {index}") for index, spec in enumerate(specs)],
        final_norm=_norm(final_norm), head=head, modules=[_places(spec) for spec in specs if spec],
        embed=causal.get_input_embeddings(), dtype=final_norm.weight.dtype,  # that of activations, not of embeddings
        context=int(getattr(causal.config, "max_position_embeddings", 0)) or 1 << 30, rotary=rotary,
        layer_types=[getattr(layer.self_attn, "layer_type", None) for layer in layers],
    )  # fmt: skip


def _places(spec: LayerSpec) -> tuple[nn.Module | None, ...]:
    qkv, gate_up = (spec.qkv + (None,) * (3 - len(spec.qkv))), (spec.gate_up + (None,) * (2 - len(spec.gate_up)))
    return (*qkv, spec.o, *gate_up, spec.down)


def _takes_layer_type(rotary: nn.Module) -> bool:
    """Whether positions turn differently by layer type. Raises NotCoveredError where they depend on the length."""
    kinds = getattr(rotary, "rope_type", "default")
    if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
        raise NotCoveredError("its rotary positions change with the length of the text")
    return "layer_type" in inspect.signature(rotary.forward).parameters


def _layer(spec: LayerSpec | None, name: str) -> Layer:
    if spec is None:
        raise NotCoveredError(f"{name} is not one that halfbyte can describe")
    if spec.head_dim % 16:
        raise NotCoveredError(f"{name} has heads of {spec.head_dim}, not a multiple of 16")
    return Layer(
        input_norm=_norm(spec.input_norm), q_norm=_optional(spec.q_norm), k_norm=_optional(spec.k_norm),
        post_attention_norm=_optional(spec.post_attention_norm), mlp_norm=_norm(spec.mlp_norm),
        post_mlp_norm=_optional(spec.post_mlp_norm), qkv=tuple(_matrix(m, name) for m in spec.qkv),
        o=_matrix(spec.o, name), gate_up=tuple(_matrix(m, name) for m in spec.gate_up), down=_matrix(spec.down, name),
        activation=spec.activation, heads=spec.num_heads, kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        scale=spec.scale, window=spec.sliding_window,
    )  # fmt: skip


def _norm(norm: Norm) -> StepNorm:
    return StepNorm(norm.weight, norm.eps, norm.offset)


def _optional(norm: Norm | None) -> StepNorm | None:
    return None if norm is None else _norm(norm)


def _matrix(module: nn.Module, name: str) -> Matrix:
    found = projection(module, training=False)
    if found is None and isinstance(module, nn.Linear) and not isinstance(module, Linear4bit):
        weight = module.weight.detach().contiguous()
        scales = getattr(module, "scales", None)
        return Matrix(weight, (weight.shape[0], weight.shape[1]), module.bias, scales=scales)
    if found is None:
        raise NotCoveredError(
            f"{name} has a {type(module).__name__} that is not a plain linear layer with one adapter"
        )
    if found.magnitude is not None:
        raise NotCoveredError(f"{name} has a DoRA adapter")
    return _quantized(found, name)


def _quantized(found: Projection, name: str) -> Matrix:
    weight = found.base.quantized_weight
    rows, cols = weight.shape
    adapter = (found.base.bias, found.lora_A, found.lora_B, found.scaling)
    if (whole := int8_rows(*weight.op_args, cols)) is not None:
        return Matrix(whole[0], (rows, cols), *adapter, scales=whole[1])
    if weight.bits != 4:
        raise NotCoveredError(f"{name} is in {weight.quant_type}")
    return Matrix(WeightView(*weight.op_args, (rows, cols)), (rows, cols), *adapter)
