"""The training objective: summed cross-entropy of a batch of sequences laid end to end."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.data import Batch, TokenizedData, to_padded
from halfbyte.errors import DataError
from halfbyte.nn import IGNORE_INDEX, chunked_cross_entropy
from halfbyte.nn.packed_attention import enable_packed_attention, supports_packed_attention


class Objective:
    """How this model's loss is computed: what it cannot take is noticed once, here, and said in `decisions`.

    Attributes:
        decisions: one sentence for each automatic choice.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder = model.base_model
        self._head = model.get_output_embeddings()
        self._vocab_size = int(self._head.weight.shape[0])
        parameters = inspect.signature(self._decoder.forward).parameters
        self._packs = "position_ids" in parameters
        self._packed_attention = self._packs and supports_packed_attention(model)
        self._chunks = self._head_stands_alone()
        self.decisions = [self._attention_decision(), self._head_decision()]

    def _attention_decision(self) -> str:
        if self._packed_attention:
            return "attention: each sequence by itself, no mask"
        if self._packs:
            return "attention: block-diagonal mask, because this architecture's attention has terms of its own"
        return "attention: one padded row per sequence, because this architecture takes no position_ids"

    def _head_decision(self) -> str:
        if self._chunks:
            return "loss: in chunks over supervised tokens, logits are never held whole"
        return "loss: over all logits, because this architecture changes them after its output layer"

    @torch.no_grad()
    def _head_stands_alone(self) -> bool:
        """Whether logits are the output layer of the last hidden state and nothing more; tried, not believed."""
        ids = torch.arange(8).unsqueeze(0) % self._vocab_size
        logits = self._model(input_ids=ids, use_cache=False).logits
        alone = self._head(self._decoder(input_ids=ids, use_cache=False).last_hidden_state)
        return bool(torch.allclose(logits, alone, rtol=1e-4, atol=1e-4 * float(logits.abs().max())))

    def check_tokens(self, data: TokenizedData) -> None:
        """See that the model knows every token of `data`.

        Raises:
            DataError: the tokenizer gives ids beyond the model's vocabulary.
        """
        largest = int(data.input_ids.max())
        if largest >= self._vocab_size:
            raise DataError(
                f"token {largest} is not in the model's vocabulary of {self._vocab_size}", where=data.report.path,
                why="the tokenizer is larger than the model", fix="Use the tokenizer that belongs to the model",
            )  # fmt: skip

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside this block `loss_sum` may be called; outside, the model is as transformers made it."""
        with ExitStack() as stack:
            if self._packed_attention:
                stack.enter_context(enable_packed_attention(self._model))
            yield

    def loss_sum(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over the batch's supervised tokens, a float32 scalar."""
        inputs, labels = self._inputs(batch)
        if self._chunks:
            hidden = self._decoder(**inputs, use_cache=False).last_hidden_state
            return chunked_cross_entropy(hidden, labels, self._head, self._vocab_size)[0]
        logits = self._model(**inputs, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    def _inputs(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        if not self._packs:
            padded = to_padded(batch)
            return {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}, padded.labels
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if self._packed_attention:
            inputs["seq_starts"] = batch.seq_starts.tolist()
        return inputs, batch.labels
