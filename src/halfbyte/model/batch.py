"""A transformers decoder for many sequences at once, each under its own adapter: what `halfbyte serve` computes with.

One native call takes in a token or more of every sequence (kernels/batch_step.py). Adapters are put into the layout of
that call and never attached to the model, which stays the base alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint import adapter as files
from halfbyte.errors import AdapterError
from halfbyte.kernels.batch_step import BLOCK, Adapter, BatchStep, LowRank, Row
from halfbyte.model.decoder_parts import DecoderParts, NotCoveredError, decoder_parts

TRIED = 24
"""Tokens of a trial: more than a block of the cache holds."""


class BatchDecoder:
    """Rows of several sequences through the base and their adapters.

    Args:
        model: a causal model without adapters.
        positions: that the cache has room for, all sequences together.
        context: that a sequence may have at most; cut to what the model was made for.

    Raises:
        NotCoveredError: the model has something that the native step does not compute, or there is no library for it.
    """

    def __init__(self, model: Any, *, positions: int, context: int) -> None:
        self._parts: DecoderParts = decoder_parts(model)
        parts = self._parts
        self.context = min(context, parts.context)
        try:
            self._step = BatchStep(
                parts.layers, parts.final_norm, parts.head, turns=parts.turns(self.context),
                num_blocks=max(positions // BLOCK, 2), cache_dtype=parts.cache_dtype,
            )  # fmt: skip
        except ValueError as error:
            raise NotCoveredError(str(error)) from error
        self.num_blocks = self._step.num_blocks
        names = {id(module): name for name, module in parts.causal.named_modules()}
        self._places = {
            names[id(module)]: (layer, place)
            for layer, modules in enumerate(parts.modules)
            for place, module in enumerate(modules)
            if module is not None
        }
        self._shapes = {name: self._shape(*place) for name, place in self._places.items()}

    @property
    def adapter_dtype(self) -> torch.dtype:
        """That adapters are kept in: where products of training run in bfloat16, they round A and B to it as well."""
        return torch.bfloat16 if self._parts.dtype == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def try_out(self) -> None:
        """Compute some tokens here and in transformers.

        Raises:
            NotCoveredError: the logits differ beyond rounding.
        """
        ids = [(7 * i + 3) % self._step.vocab_size for i in range(min(TRIED, self.context))]
        expected = self._parts.causal(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        blocks = torch.arange(-(-len(ids) // BLOCK), dtype=torch.int32)
        try:
            found = self.run(ids, [Row(i, blocks, None) for i in range(len(ids))], list(range(len(ids))))
        except ValueError as error:
            raise NotCoveredError(str(error)) from error
        off, size = float((found - expected).abs().max()), float(expected.abs().max())
        if not off <= self._parts.tolerance * size:
            raise NotCoveredError(f"its logits differ from the native step's by {off:.2g} of {size:.2g}")

    def load(self, saved: files.Adapter) -> Adapter:
        """An adapter, as read and checked, for the rows of `run`.

        Raises:
            AdapterError: a tensor has no place in this model, or another shape than it.
        """
        layers: list[list[LowRank | None]] = [[None] * len(modules) for modules in self._parts.modules]
        wrong = []
        for name, (lora_A, lora_B, scaling) in files.pairs(saved).items():
            shape = (lora_B.shape[0], lora_A.shape[1])
            if self._shapes.get(name) != shape:
                wrong.append(f"{name} is {shape} there, {self._shapes.get(name, 'no adapted layer')} here")
                continue
            layer, place = self._places[name]
            layers[layer][place] = LowRank(lora_A, lora_B, scaling)
        if wrong:
            raise AdapterError(
                f"{len(wrong)} tensors do not fit this model", where=str(saved.folder), why="; ".join(wrong[:5])
            )
        exact = all(tensor.dtype == torch.bfloat16 for tensor in saved.state.values())
        return Adapter(layers, torch.bfloat16 if exact else self.adapter_dtype)

    @torch.no_grad()
    def run(self, ids: Sequence[int], rows: Sequence[Row], wanted: Sequence[int]) -> Tensor:
        """Take in token `ids[i]` at `rows[i]`; logits (wanted, vocab_size) float32 after the rows that are wanted."""
        return self._step.run(rows, self._parts.embed(torch.tensor(ids)), wanted)

    def _shape(self, layer: int, place: int) -> tuple[int, int]:
        found = self._parts.layers[layer]
        matrices = [*found.qkv, *[None] * (3 - len(found.qkv)), found.o]
        matrices += [*found.gate_up, *[None] * (2 - len(found.gate_up)), found.down]
        matrix = matrices[place]
        assert matrix is not None
        return matrix.shape
