"""The training objective, summed over sequences laid end to end: cross-entropy, or KL from another model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.data import Batch, TokenizedData, compact, join_batches, to_padded
from halfbyte.errors import ConfigError, DataError
from halfbyte.model.fuse import same_rows
from halfbyte.nn import IGNORE_INDEX, chunked_cross_entropy, chunked_divergence
from halfbyte.nn.fused_layer import FusedLayer, fuse_layers, unfuse_layers
from halfbyte.nn.packed_attention import enable_packed_attention, supports_packed_attention
from halfbyte.store import ActivationStore

PACKED, MASKED, PADDED = "packed", "masked", "padded"
_SAID = {
    PACKED: "attention: each sequence by itself, no mask",
    MASKED: "attention: block-diagonal mask, because this architecture's attention has terms of its own",
    PADDED: "attention: one padded row per sequence, because in this architecture packed ones would mix",
}
_FIRST, _SECOND = 5, 9
"""Tokens of the two sequences of the trial."""
_ALIKE = 4
"""Tokens with which both begin where it is tried whether what samples share can stand once."""


class Objective:
    """How this model's loss is computed: what it cannot take is noticed once, here, and said in `decisions`.

    Args:
        activations: keeps what is saved for the backward pass; None for memory.

    Attributes:
        layout: how sequences are laid out: "packed", "masked" or "padded".
        decisions: one sentence for each automatic choice.
    """

    def __init__(self, model: PreTrainedModel, activations: ActivationStore | None = None) -> None:
        self._model, self._activations = model, activations
        self._decoder = model.base_model
        self._head = model.get_output_embeddings()
        self._vocab_size = int(self._head.weight.shape[0])
        self._device = self._head.weight.device
        self._fuse, self._num_fused, self._fuse_all, self._compact = False, 0, False, False
        self._wanted: Tensor | None = None
        was_training = model.training
        model.eval()  # dropout, the adapter's too, would make two passes differ
        self._try_out()
        model.train(was_training)
        self.decisions = [_SAID[self.layout], self._head_decision(), self._fusion_decision()]
        self.decisions.append(self._compact_decision())

    @torch.no_grad()
    def _try_out(self) -> None:
        """Which layout keeps sequences apart, and whether logits are the output layer's alone; tried, not believed.

        State-space layers, convolutions and some attention let one packed sequence see the one before it, and
        nothing in a config says so for all of them.
        """
        ids = (torch.arange(_FIRST + _SECOND) * 37 + 1).unsqueeze(0) % self._vocab_size
        second = ids[:, _FIRST:].to(self._device)
        alone = self._decoder(input_ids=second, use_cache=False).last_hidden_state
        logits = self._model(input_ids=second, use_cache=False).logits
        self._chunks = same_rows(self._head(alone), logits, half=1e-4)
        positions = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)]).unsqueeze(0)
        batch = Batch(
            input_ids=ids, labels=ids, position_ids=positions, num_targets=0, num_tokens=_FIRST + _SECOND,
            seq_starts=torch.tensor([0, _FIRST, _FIRST + _SECOND]),
        )  # fmt: skip
        for layout in self._layouts():
            self.layout = layout
            try:
                hidden = self._hidden(batch)
            except (TypeError, ValueError, RuntimeError):  # it does not pass on what the layout needs
                continue
            # Measured on 45 tiny architectures: rounding gives at most 6e-7 in float32 and 1.9e-2 in bfloat16,
            # sequences that mix 1.5e-2 (one), 0.12 and more (all others).
            if same_rows(hidden[:, _FIRST:], alone, single=1e-3, half=5e-2):
                self._try_fusion(batch, hidden)
                return
        self.layout = PADDED

    def _try_fusion(self, batch: Batch, hidden: Tensor) -> None:
        """Whether the decoder layers, each as one function, give what the plain ones gave on `batch`."""
        if self.layout != PACKED:
            return
        self._fuse = True
        fused = self._hidden(batch)
        self._fuse = self._num_fused > 0 and same_rows(fused, hidden)
        layers = getattr(self._model.config.get_text_config(), "num_hidden_layers", None)
        self._fuse_all = self._fuse and self._num_fused == layers
        if self._fuse_all:  # others may have dropout, which would be shared too
            self._try_compact(batch, hidden)

    def _try_compact(self, batch: Batch, hidden: Tensor) -> None:
        """Whether a sequence that goes on from a piece of another one has the hidden states it had in `batch`."""
        first, second = batch.input_ids.split([_FIRST, _SECOND], dim=1)
        ids = torch.cat([second[:, :_ALIKE], first, second[:, _ALIKE:]], dim=1)
        ends = _ALIKE + _FIRST, _FIRST + _SECOND
        pieces = Batch(
            input_ids=ids, labels=ids, num_targets=0, num_tokens=ends[1],
            position_ids=torch.cat([torch.arange(ends[0]), torch.arange(_ALIKE, _SECOND)]).unsqueeze(0),
            seq_starts=torch.tensor([0, _ALIKE, *ends]), parents=torch.tensor([-1, 0, 0]),
        )  # fmt: skip
        try:
            found = self._hidden(pieces)
        except (TypeError, ValueError, RuntimeError):
            return
        own = slice(_ALIKE - _SECOND, None)
        self._compact = same_rows(found[:, own], hidden[:, own])

    def _hidden(self, batch: Batch) -> Tensor:
        with self.ready():
            hidden: Tensor = self._decoder(**self._inputs(batch)[0], use_cache=False).last_hidden_state
        return hidden

    def _layouts(self) -> list[str]:
        """Layouts worth trying, the cheapest first."""
        if "position_ids" not in inspect.signature(self._decoder.forward).parameters:
            return []
        return [PACKED, MASKED] if supports_packed_attention(self._model) else [MASKED]

    def _head_decision(self) -> str:
        if self._chunks:
            return "loss: in chunks over supervised tokens, logits are never held whole"
        return "loss: over all logits, because this architecture changes them after its output layer"

    def _fusion_decision(self) -> str:
        if self._fuse:
            return f"layers: {self._num_fused} decoder layers run as one function each"
        why = "fused, they gave another result" if self._num_fused else "fused ones know no such modules"
        return f"layers: as transformers wrote them, because {why}"

    @property
    def fused(self) -> bool:
        """Whether all decoder layers run as one function each."""
        return self._fuse_all

    def _compact_decision(self) -> str:
        if self._compact:
            return "tokens: what samples begin with alike is computed once, what follows the last target not at all"
        return "tokens: all of every sample, because only fused layers let samples share their beginnings"

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

    def checkpoint_layers(self) -> None:
        """Have layers keep their inputs only; plain ones that are streamed do so anyway."""
        self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with self.ready():
            for layer in self._model.modules():
                if getattr(layer, "streamed", None) is not None and not isinstance(layer, FusedLayer):
                    layer.gradient_checkpointing = False

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside this block `loss_sum` may be called; outside, the model is as transformers made it."""
        with ExitStack() as stack:
            if self.layout == PACKED:
                stack.enter_context(enable_packed_attention(self._model))
            if self._fuse:
                self._num_fused = fuse_layers(self._model)
                stack.callback(unfuse_layers, self._model)
            yield

    def loss_sum(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over the batch's supervised tokens, a float32 scalar."""
        inputs, labels = self._inputs(self._needed(batch))
        if self._chunks:
            with self._saved_elsewhere():
                hidden = self._decoder(**inputs, use_cache=False).last_hidden_state
            return self._loss_of(hidden, labels)
        with self._saved_elsewhere():
            logits = self._model(**inputs, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    def loss_sums(self, batches: list[Batch]) -> list[Tensor]:
        """`loss_sum` of each batch, computed together: every layer takes all of them before the next layer begins."""
        if len(batches) == 1 or not (self._fuse_all and self._chunks):
            return [self.loss_sum(batch) for batch in batches]
        batches = [self._needed(batch) for batch in batches]
        joined, bounds = join_batches(batches)
        inputs, _ = self._inputs(joined)
        with self._saved_elsewhere():
            hidden = self._decoder(**inputs, micro_batches=bounds, use_cache=False).last_hidden_state
        parts = hidden.split([batch.input_ids.shape[1] for batch in batches], dim=1)
        return [self._loss_of(part, batch.labels) for part, batch in zip(parts, batches, strict=True)]

    def match(self, wanted: Tensor) -> None:
        """From now on a batch's labels are rows of `wanted` (n, hidden size), last hidden states of a model with the
        same output layer, and the loss is how far the predictions are from what that layer makes of them.

        Raises:
            ConfigError: the architecture changes logits after its output layer.
        """
        if not self._chunks:
            raise ConfigError(
                "cannot be matched to another model", where="lora.match_steps", why=self._head_decision(),
                fix="Give --set lora.match_steps=0",
            )  # fmt: skip
        self._wanted = wanted

    def _loss_of(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self._wanted is not None:
            return chunked_divergence(hidden, labels, self._wanted, self._head, self._vocab_size)
        return chunked_cross_entropy(hidden, labels, self._head, self._vocab_size)[0]

    def _needed(self, batch: Batch) -> Batch:
        return compact(batch) if self._compact else batch

    def _saved_elsewhere(self) -> AbstractContextManager[Any]:
        """Inside the block, what the backward pass needs goes to where it is kept."""
        return nullcontext() if self._activations is None else self._activations.hooks()

    def _inputs(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        """What the model takes, on its device, and the labels, where they are."""
        if self.layout == PADDED:
            padded = to_padded(batch)
            ids, mask = padded.input_ids.to(self._device), padded.attention_mask.to(self._device)
            return {"input_ids": ids, "attention_mask": mask}, padded.labels
        ids, places = batch.input_ids.to(self._device), batch.position_ids.to(self._device)
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": places}
        if self.layout == PACKED:
            inputs["seq_starts"] = batch.seq_starts.tolist()
            inputs["parents"] = None if batch.parents is None else batch.parents.tolist()
        return inputs, batch.labels
