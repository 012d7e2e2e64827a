"""Tokens whose rows are trained: what the tokenizer lacks of them is added, and the tables that have no row for them
grow while they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import ConfigError
from halfbyte.model.base_hash import BaseHash
from halfbyte.model.read import unquantized_slices, weight_of
from halfbyte.model.source import TensorReader
from halfbyte.nn.int8_embedding import Int8Embedding
from halfbyte.nn.row_embedding import RowEmbedding
from halfbyte.quant.int8 import dequantize_int8, quantize_int8
from halfbyte.quant.memory import lasting


@dataclass(frozen=True)
class Tokens:
    """Tokens whose rows are trained.

    Attributes:
        ids: of each.
        pieces: of each that was added, by its id: the tokens that its text was before.
        rows: that embeddings and head have at least.
    """

    ids: tuple[int, ...] = ()
    pieces: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    rows: int = 0


NONE = Tokens()


def choose_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tokens:
    """The tokens `texts`; those that `tokenizer` has not are added to it, as plain ones: wherever the text stands, in
    a sample or in a template, it is the token, and an answer's text has it.

    Raises:
        ConfigError: the tokenizer makes nothing of a text.
    """
    known = tokenizer.get_vocab()
    pieces = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts if text not in known}
    for text, ids in pieces.items():
        if not ids:
            raise ConfigError(f"{text!r} is no text to the tokenizer", where="lora.trainable_tokens")
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in pieces])
    known = tokenizer.get_vocab()
    ids = tuple(int(known[text]) for text in texts)
    return Tokens(ids, {known[text]: tuple(ids) for text, ids in pieces.items()}, max(ids, default=-1) + 1)


def tables_to_grow(model: PreTrainedModel, tokens: Tokens) -> set[str]:
    """Names of the weights of input embedding and output head that have too few rows for `tokens`.

    Raises:
        ConfigError: they have, and are not what we know to grow; or there are rows between that no token is known of.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    stored = int(weight_of(embedding).shape[0])
    if tokens.rows <= stored:
        return set()
    new = sum(number >= stored for number in tokens.ids)
    if new < tokens.rows - stored and tokens.rows == max(tokens.ids, default=-1) + 1:
        raise ConfigError(
            f"{new} new tokens go up to {tokens.rows - 1}", where="lora.trainable_tokens",
            why=f"the model has {stored} rows", fix="Use the tokenizer that belongs to the model",
        )  # fmt: skip
    if (
        not isinstance(embedding, nn.Embedding)
        or type(head) is not nn.Linear
        or getattr(head, "bias", None) is not None
    ):
        raise ConfigError(
            "cannot be added to this architecture", where="lora.trainable_tokens",
            why=f"it has a {type(embedding).__name__} as embeddings and a {type(head).__name__} as output head",
        )  # fmt: skip
    return {f"{name}.weight" for name, module in model.named_modules() if module is embedding or module is head}


def read_grown(
    reader: TensorReader, stored: str, expected: Tensor, rows: int, path: str, through: BaseHash, name: str
) -> Tensor:
    """Tensor `stored` as it is stored, and zeros up to `rows` rows; `through` hashes what is stored, as `name`.

    Raises:
        ModelError: as `read_unquantized`.
    """
    dtype, width = reader.dtype(stored), expected.shape[1]
    table, done = lasting(rows * width * dtype.itemsize).view(dtype).view(rows, width), 0
    for part in through.through(name, unquantized_slices(reader, stored, expected, path)):
        table[done : done + len(part)] = part
        done += len(part)
    return table


@torch.no_grad()
def fill_grown(model: PreTrainedModel, tokens: Tokens) -> None:
    """Set the new rows of tables that have grown to where `begin` says that training begins; its config says so."""
    config = model.config.get_text_config()
    stored = config.vocab_size
    if tokens.rows <= stored:
        return
    config.vocab_size = tokens.rows
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for name in ("num_embeddings", "out_features"):
            if hasattr(module, name):
                setattr(module, name, tokens.rows)
        new = tuple(number for number in tokens.pieces if number >= stored)
        if new:
            _set_rows(module, new, begin(module, Tokens(new, tokens.pieces)))


def begin(module: nn.Module, tokens: Tokens) -> Tensor:
    """(n, hidden_size) float32: where the rows of `tokens` in embedding or head `module` begin: what they are, and
    of an added token the mean of its pieces' rows. That is near what the model made of its text so far, no two tokens
    begin alike, and the head gives it no more than its likeliest piece."""
    rows = rows_of(module, tokens.ids)
    for place, number in enumerate(tokens.ids):
        if number in tokens.pieces:
            rows[place] = rows_of(module, tokens.pieces[number]).mean(0)
    return rows


def rows_of(module: nn.Module, ids: Sequence[int]) -> Tensor:
    """(len(ids), hidden_size) float32: these rows of an embedding or head, however it holds them; a copy."""
    if isinstance(module, RowEmbedding):
        return module.rows_of(torch.tensor(ids)).float()
    weight, scales = weight_of(module).detach(), getattr(module, "scales", None)
    where = torch.tensor(ids, device=weight.device)
    if isinstance(module, Int8Embedding):
        return module.rows_of(where).float()
    if scales is None:
        return weight[where].to(torch.float32, copy=True)
    return dequantize_int8(weight[where], scales[where], torch.float32)


def _set_rows(module: nn.Module, ids: Sequence[int], values: Tensor) -> None:
    if isinstance(module, RowEmbedding):
        module.set_rows(torch.tensor(ids), values)
        return
    weight, scales = weight_of(module).data, getattr(module, "scales", None)
    where = torch.tensor(ids, device=weight.device)
    if scales is None:
        weight[where] = values.to(weight.dtype)
    else:
        weight[where], scales[where] = quantize_int8(values)
