"""Embedding and head of a merged model: the base's, with the rows in their places that an adapter trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halfbyte.checkpoint.rows import Rows, token_rows
from halfbyte.errors import AdapterError
from halfbyte.merge.base import MergeBase
from halfbyte.merge.parts import Part
from halfbyte.model.load import skeleton
from halfbyte.model.read import weight_of
from halfbyte.model.source import adapter_tokenizer
from halfbyte.model.tokens import tables_to_grow
from halfbyte.model.trained_rows import tokens_of

Tables = Mapping[str, tuple[tuple[int, ...] | None, Tensor]]
"""By the name of the parameter: the tokens whose rows these are, None for all, and the rows."""


def tables_of(part: Part, base: MergeBase) -> tuple[Tables, MergeBase]:
    """The trained rows of an adapter, and `base` with room for them.

    Raises:
        AdapterError: they are not of the base's embedding and head, or make two tables of one.
        ConfigError: the base's cannot grow, or not so far.
    """
    found = token_rows(part.adapter.state, part.adapter.config)
    if not found:
        return {}, base
    model = base.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {name: f"{name}.weight" for name, module in model.named_modules() if module in (embedding, head)}
    tied = any(name not in base.names for name in names.values())
    _check(part, found, set(names), tied=tied)
    stored, width = weight_of(embedding).shape
    least = max(len(rows) if ids is None else max(ids) + 1 for ids, rows in found.values())
    covered = tied or len(found) == len(names)
    wrong = [
        name for name, (ids, rows) in found.items() if rows.shape[1] != width or (ids is None and len(rows) < stored)
    ]
    if wrong or (least > stored and not covered):
        why = f"{wrong[0]} does not fit {(stored, width)}" if wrong else f"new tokens have rows of {min(found)} alone"
        raise AdapterError(
            "cannot be merged into this model", where=part.label, why=why,
            fix="Give the base that the adapter was trained on",
        )  # fmt: skip
    tables_to_grow(model, tokens_of(part.adapter))
    tables = {names[name]: (ids, rows.float()) for name, (ids, rows) in found.items() if names[name] in base.names}
    return tables, _grown(base, least)


def _check(part: Part, found: Rows, names: set[str], *, tied: bool) -> None:
    strange = set(found) - names
    untied = tied and part.adapter.config.get("modules_to_save") and not part.adapter.config.get("ensure_weight_tying")
    if strange or untied:
        raise AdapterError(
            f"trained {min(strange)} whole" if strange else "trained one of embedding and head, which are one table",
            where=part.label, why="only the input embedding and the output head are merged so",
            fix="Merge it with PEFT's merge_and_unload onto a 16-bit base",
        )  # fmt: skip


def _grown(base: MergeBase, rows: int) -> MergeBase:
    """`base` whose embedding and head have at least `rows` rows; `unquantized` still gives those that are stored."""
    stored = len(weight_of(base.model.get_input_embeddings()))
    if rows <= stored:
        return base
    base.source.config.get_text_config().vocab_size = rows
    return replace(base, model=skeleton(base.source), stored_rows=stored)


def with_rows(stored: Tensor, table: tuple[tuple[int, ...] | None, Tensor]) -> Tensor:
    """The table, float32, with the rows in their places."""
    ids, rows = table
    if ids is None:
        return rows
    count = max(len(stored), max(ids) + 1)
    whole = torch.zeros(count, stored.shape[1])
    whole[: len(stored)] = stored
    whole[list(ids)] = rows
    return whole


def refuse_rows(parts: tuple[Part, ...], *, alone: bool) -> None:
    """AdapterError where trained rows, which are no update, are to be part of a sum or written `alone`."""
    for part in parts:
        found = token_rows(part.adapter.state, part.adapter.config)
        if found and (alone or len(parts) > 1 or part.weight != 1):
            raise AdapterError(
                f"has trained rows of {', '.join(sorted(found))}, which cannot be added to or written apart",
                where=part.label, fix="Merge it alone, with weight 1, into 16bit, 4bit or gguf",
            )  # fmt: skip


def tokenizer_of(parts: tuple[Part, ...], path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that is merged along: the base's, or an adapter's own."""
    return adapter_tokenizer(path, parts[0].adapter)
