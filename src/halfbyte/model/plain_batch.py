"""What `BatchDecoder` does, through transformers and PEFT: for models, machines and adapters that it does not cover.

One forward a sequence, so a batch is no faster than its sequences one after the other.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from halfbyte.checkpoint import Adapter
from halfbyte.kernels.batch_step import BLOCK, Row
from halfbyte.model.adapt import attach_saved

MOST_CACHES = 64


class PeftAdapter:
    """An adapter on the model under `name`."""

    def __init__(self, name: str) -> None:
        self.name = name


class PlainBatch:
    """Rows of several sequences, each through the model's own forward; as `BatchDecoder` for its caller."""

    def __init__(self, model: Any, *, positions: int, context: int) -> None:
        self._model = model
        self.context = min(context, int(getattr(model.config, "max_position_embeddings", 0)) or context)
        self.num_blocks = max(positions // BLOCK, 2)
        self._tokens = torch.zeros(self.num_blocks, BLOCK, dtype=torch.long)  # where the kernel has keys and values
        self._caches: OrderedDict[tuple[str, tuple[int, ...]], DynamicCache] = OrderedDict()
        self._lock = threading.Lock()  # an adapter comes on another thread than rows do
        self._made = 0
        self._gone: list[str] = []

    def load(self, saved: Adapter) -> PeftAdapter:
        """An adapter, as read and checked, for the rows of `run`. Raises AdapterError where it does not fit."""
        with self._lock:
            self._forget()
            self._made += 1
            made = PeftAdapter(f"adapter{self._made}")
            self._model = attach_saved(self._model, saved, made.name)
            weakref.finalize(made, self._gone.append, made.name)
            return made

    @torch.no_grad()
    def run(self, ids: Sequence[int], rows: Sequence[Row], wanted: Sequence[int]) -> Tensor:
        """Take in token `ids[i]` at `rows[i]`; logits (wanted, vocab_size) float32 after the rows that are wanted."""
        found: dict[int, Tensor] = {}
        with self._lock:
            self._forget()
            for _, group in groupby(range(len(rows)), key=lambda i: id(rows[i].blocks)):
                numbers = list(group)
                logits = self._sequence([ids[i] for i in numbers], rows[numbers[0]])
                found |= {i: logits[at] for at, i in enumerate(numbers) if i in wanted}
        return torch.stack([found[i] for i in wanted]) if wanted else torch.empty(0, 1)

    def _sequence(self, ids: list[int], first: Row) -> Tensor:
        """(len(ids), vocab_size) float32, of a sequence that goes on at the row `first`."""
        places = range(first.position, first.position + len(ids))
        for position, token in zip(places, ids, strict=True):
            self._tokens[int(first.blocks[position // BLOCK]), position % BLOCK] = token
        before = tuple(self._tokens[first.blocks.long()].flatten()[: first.position].tolist())
        name = cast(Any, first.adapter).name if first.adapter is not None else ""
        cache = self._caches.pop((name, before), None)
        if cache is None:
            cache = self._cut_back(name, before)
        given = ids if cache is not None else [*before, *ids]
        cache = cache if cache is not None else DynamicCache(config=self._model.config)
        adapted = hasattr(self._model, "set_adapter") and hasattr(self._model, "peft_config")
        if name:
            self._model.set_adapter(name)
        with self._model.disable_adapter() if adapted and not name else nullcontext():
            output = self._model(
                input_ids=torch.tensor([given], device=self._model.device), past_key_values=cache, use_cache=True,
                logits_to_keep=len(ids),
            )  # fmt: skip
        self._caches[name, (*before, *ids)] = cache
        while len(self._caches) > MOST_CACHES:
            self._caches.popitem(last=False)
        logits: Tensor = output.logits[0].float().cpu()
        return logits

    def _cut_back(self, name: str, before: tuple[int, ...]) -> DynamicCache | None:
        """The part up to `before` of a sequence that went on otherwise, such as a conversation's last turn."""
        for key in reversed(self._caches) if before else ():
            if key[0] == name and key[1][: len(before)] == before:
                cache = self._caches.pop(key)
                try:
                    cache.crop(len(before) - len(key[1]))
                except (RuntimeError, ValueError):  # layers that forget what they have passed
                    return None
                return cache
        return None

    def _forget(self) -> None:
        """Take unloaded adapters off the model; the last one stays, since PEFT does without none."""
        while self._gone and len(self._model.peft_config) > 1:
            name = self._gone.pop()
            self._model.set_adapter(next(other for other in self._model.peft_config if other != name))
            self._model.delete_adapter(name)
