"""A transformers decoder without transformers: one native call a token, the adapter applied unmerged.

The prompt goes through the model's own forward; its cache is taken over. What a layer computes is read off its
modules, and `try_out` computes two tokens both ways: a model with something more to it (logits scaled, attention
capped) differs there and is left to transformers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from halfbyte.kernels import token_step
from halfbyte.kernels.cpu import WeightView
from halfbyte.nn import Linear4bit
from halfbyte.nn.fused_layer import fuse_layers, unfuse_layers
from halfbyte.nn.layer_spec import LayerSpec, Norm, Projection, describe, projection, rms_norm

MOST_TRIED = 16
"""Tokens of a prompt that a trial starts from."""
CHUNK = 256
"""The caches grow by at least this many positions, and by half of what they hold."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits between the two ways, as a part of the largest logit. transformers computes in the
model's dtype, we in float32. Measured over the tiny models of tests/model/test_decode.py, with and without adapter, on
12 tokens: 1e-5, 1e-2, and up to 0.17 in bfloat16, whose rounding such models enlarge; more goes to transformers."""


class NotCoveredError(Exception):
    """Why transformers has to generate."""


class Decoder:
    """Prompt, then token by token, at batch 1. It sees the adapter as it is when the decoder is made.

    Raises:
        NotCoveredError: the model has something that the native step does not compute, or there is no library for it.
    """

    def __init__(self, model: Any) -> None:
        causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner: Any = getattr(causal, getattr(causal, "base_model_prefix", ""), None)
        layers, rotary = getattr(inner, "layers", None), getattr(inner, "rotary_emb", None)
        final_norm = rms_norm(inner.norm) if hasattr(inner, "norm") else None
        if layers is None or rotary is None or final_norm is None:
            raise NotCoveredError("it is not built as layers with rotary positions and a norm after them")
        if any(hasattr(layer, "streamed") for layer in layers):
            raise NotCoveredError("its layers are streamed")
        specs = [describe(layer) for layer in layers]
        head = _matrix(causal.get_output_embeddings(), "the output head")
        dtype = final_norm.weight.dtype  # that of activations; embeddings and head may be stored in another
        try:
            self._step = token_step.TokenStep(
                [_layer(spec, f"layer {index}") for index, spec in enumerate(specs)], _norm(final_norm), head,
                cache_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
            )  # fmt: skip
        except ValueError as error:
            raise NotCoveredError(str(error)) from error
        self._causal, self._rotary = causal, rotary
        self._layer_types = [getattr(layer.self_attn, "layer_type", None) for layer in layers]
        self._turns_by_type = _takes_layer_type(rotary)
        self._embed = causal.get_input_embeddings()
        self._tolerance = TOLERANCE[dtype]
        self._context = int(getattr(causal.config, "max_position_embeddings", 0)) or 1 << 30

    @torch.no_grad()
    def try_out(self, ids: list[int]) -> None:
        """Compute two tokens after `ids` here and in transformers.

        Raises:
            NotCoveredError: the logits differ beyond rounding.
        """
        cache = DynamicCache()
        token = int(self._forward(ids[:MOST_TRIED], cache).argmax())
        self._take(cache)
        for _ in range(2):
            expected = self._forward([token], cache)
            try:
                found = self.step(token)
            except ValueError as error:
                raise NotCoveredError(str(error)) from error
            off, size = float((found - expected).abs().max()), float(expected.abs().max())
            if not off <= self._tolerance * size:
                raise NotCoveredError(f"its logits differ from the native step's by {off:.2g} of {size:.2g}")
            token = int(expected.argmax())

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> Tensor:
        """Start anew with a prompt of at least one token; logits (vocab_size,) float32 after it."""
        cache = DynamicCache()
        fuse_layers(self._causal)  # by the descriptions that `try_out` has proven
        try:
            logits = self._forward(ids, cache)
        finally:
            unfuse_layers(self._causal)
        self._take(cache)
        return logits

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Take in one token; logits (vocab_size,) float32 after it."""
        if self._step.length == self._step.capacity:
            self._grow(self._step.length + 1)
        return self._step.step(self._embed(torch.tensor([token])))

    def _forward(self, ids: list[int], cache: DynamicCache) -> Tensor:
        output = self._causal(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def _take(self, cache: DynamicCache) -> None:
        self._step.length = 0
        length = cache.get_seq_length()
        if length > self._step.capacity:
            self._grow(length + 1)
        for index, layer in enumerate(cache.layers):
            self._step.fill(index, layer.keys[0], layer.values[0])
        self._step.length = length

    def _grow(self, least: int) -> None:
        capacity = max(least, min(max(least + CHUNK, least + least // 2), self._context))
        capacity = -(-capacity // CHUNK) * CHUNK
        positions = torch.arange(capacity).unsqueeze(0)
        like = torch.empty(1, dtype=torch.float32)
        kinds = {kind: self._rotary(like, positions, **({"layer_type": kind} if self._turns_by_type else {}))
                 for kind in set(self._layer_types if self._turns_by_type else [None])}  # fmt: skip
        turns = [kinds[kind if self._turns_by_type else None] for kind in self._layer_types]
        self._step.reserve(capacity, [(cos[0], sin[0]) for cos, sin in turns])


def _takes_layer_type(rotary: nn.Module) -> bool:
    """Whether positions turn differently by layer type. Raises NotCoveredError where they depend on the length."""
    kinds = getattr(rotary, "rope_type", "default")
    if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
        raise NotCoveredError("its rotary positions change with the length of the text")
    return "layer_type" in inspect.signature(rotary.forward).parameters


def _layer(spec: LayerSpec | None, name: str) -> token_step.Layer:
    if spec is None:
        raise NotCoveredError(f"{name} is not one that halfbyte can describe")
    if spec.head_dim % 16:
        raise NotCoveredError(f"{name} has heads of {spec.head_dim}, not a multiple of 16")
    return token_step.Layer(
        input_norm=_norm(spec.input_norm), q_norm=_optional(spec.q_norm), k_norm=_optional(spec.k_norm),
        post_attention_norm=_optional(spec.post_attention_norm), mlp_norm=_norm(spec.mlp_norm),
        post_mlp_norm=_optional(spec.post_mlp_norm), qkv=tuple(_matrix(m, name) for m in spec.qkv),
        o=_matrix(spec.o, name), gate_up=tuple(_matrix(m, name) for m in spec.gate_up), down=_matrix(spec.down, name),
        activation=spec.activation, heads=spec.num_heads, kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        scale=spec.scale, window=spec.sliding_window,
    )  # fmt: skip


def _norm(norm: Norm) -> token_step.Norm:
    return token_step.Norm(norm.weight, norm.eps, norm.offset)


def _optional(norm: Norm | None) -> token_step.Norm | None:
    return None if norm is None else _norm(norm)


def _matrix(module: nn.Module, name: str) -> token_step.Matrix:
    found = projection(module, training=False)
    if found is None and isinstance(module, nn.Linear) and not isinstance(module, Linear4bit):
        weight = module.weight.detach().contiguous()
        scales = getattr(module, "scales", None)
        return token_step.Matrix(weight, (weight.shape[0], weight.shape[1]), module.bias, scales=scales)
    if found is None:
        raise NotCoveredError(
            f"{name} has a {type(module).__name__} that is not a plain linear layer with one adapter"
        )
    return _quantized(found)


def _quantized(found: Projection) -> token_step.Matrix:
    weight = found.base.quantized_weight
    rows, cols = weight.shape
    view = WeightView(
        weight.codes, weight.absmax, weight.nested_absmax, weight.nested_offset, weight.quant_type, weight.blocksize,
        (rows, cols),
    )  # fmt: skip
    return token_step.Matrix(view, (rows, cols), found.base.bias, found.lora_A, found.lora_B, found.scaling)
