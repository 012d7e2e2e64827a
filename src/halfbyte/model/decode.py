"""A transformers decoder without transformers: one native call a token, the adapter applied unmerged.

The prompt goes through the model's own forward; its cache is taken over. What a layer computes is read off its
modules, and `try_out` computes two tokens both ways: a model with something more to it (logits scaled, attention
capped) differs there and is left to transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from halfbyte.kernels.token_step import TokenStep
from halfbyte.model.decoder_parts import NotCoveredError, decoder_parts
from halfbyte.nn.fused_layer import fuse_layers, unfuse_layers

MOST_TRIED = 16
"""Tokens of a prompt that a trial starts from."""
CHUNK = 256
"""The caches grow by at least this many positions, and by half of what they hold."""


class Decoder:
    """Prompt, then token by token, at batch 1. It sees the adapter as it is when the decoder is made.

    Raises:
        NotCoveredError: the model has something that the native step does not compute, or there is no library for it.
    """

    def __init__(self, model: Any) -> None:
        self._parts = parts = decoder_parts(model)
        try:
            self._step = TokenStep(parts.layers, parts.final_norm, parts.head, cache_dtype=parts.cache_dtype)
        except ValueError as error:
            raise NotCoveredError(str(error)) from error
        self._causal = parts.causal

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
            if not off <= self._parts.tolerance * size:
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
        return self._step.step(self._parts.embed(torch.tensor([token])))

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
        capacity = max(least, min(max(least + CHUNK, least + least // 2), self._parts.context))
        capacity = -(-capacity // CHUNK) * CHUNK
        self._step.reserve(capacity, self._parts.turns(capacity))
