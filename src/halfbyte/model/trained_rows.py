"""Rows of embedding and head that are trained (lora.trainable_tokens), or all of them (lora.modules_to_save), under
PEFT's names in an adapter's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.checkpoint.adapter import Adapter
from halfbyte.checkpoint.rows import ROWS, token_rows
from halfbyte.config import LoraConfig
from halfbyte.config.names import matches
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.model.read import weight_of
from halfbyte.model.tokens import Tokens, begin, rows_of
from halfbyte.nn import FrozenLinear
from halfbyte.nn.row_embedding import RowEmbedding
from halfbyte.nn.trained_rows import TrainedEmbedding, TrainedHead, TrainedRows

AT_ONCE = 1024
"""Rows that are copied at a time."""


def train_rows(model: PreTrainedModel, lora: LoraConfig, tokens: Tokens) -> dict[str, Any]:
    """Have the rows trained that `lora` and `tokens` say; what PEFT's config says of them.

    Raises:
        ConfigError: a module that is neither the input embedding nor the output head; a head that cannot be trained.
    """
    tables = _tables(model)
    whole = [name for name in tables if matches(name, lora.modules_to_save)]
    unknown = [want for want in lora.modules_to_save if not any(matches(name, (want,)) for name in tables)]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} cannot be trained whole", where="lora.modules_to_save",
            fix="This model has " + ", ".join(_last(name) for name in tables),
        )  # fmt: skip
    tied = is_tied(model)
    if tied and len(whole) == 1:
        raise ConfigError(
            f"{_last(whole[0])} alone cannot be trained whole", where="lora.modules_to_save",
            why="embedding and head are one table in this model", fix="Name both, or none",
        )  # fmt: skip
    indices: dict[str, list[int]] = {}
    rows: nn.Parameter | None = None
    for name, module in tables.items():
        if name not in whole and not tokens.ids:
            continue
        if rows is None or not tied:
            rows = nn.Parameter(_all_rows(module, tokens) if name in whole else begin(module, tokens))
            indices |= {} if name in whole else {_last(name): list(tokens.ids)}
        _place(model, name, rows, None if name in whole else tokens.ids)
    saved = [_last(name) for name in (whole[:1] if tied else whole)]
    return {
        "trainable_token_indices": indices or None, "modules_to_save": saved or None,
        "ensure_weight_tying": tied and bool(whole),
    }  # fmt: skip


def tokens_of(adapter: Adapter) -> Tokens:
    """The tokens whose rows `adapter` has: what a base needs rows for before `place_rows`."""
    found = token_rows(adapter.state, adapter.config).values()
    ids = {number for own, _ in found for number in own or ()}
    return Tokens(
        tuple(sorted(ids)), rows=max([0, *(len(rows) if own is None else max(own) + 1 for own, rows in found)])
    )


def place_rows(model: PreTrainedModel, adapter: Adapter) -> None:
    """Put the trained rows of `adapter` in their places, frozen; the tables have rows for all of them.

    Raises:
        AdapterError: they are of other modules, or of another size, than the model's embedding and head.
    """
    found = token_rows(adapter.state, adapter.config)
    tables = _tables(model) if found else {}
    tied = is_tied(model) if found else False
    width = _width(model.get_input_embeddings()) if found else 0
    for name, (ids, rows) in found.items():
        size = _count(tables[name]) if name in tables else 0
        if name not in tables or rows.shape[1] != width or (ids is None and len(rows) != size):
            what = "rows of tokens" if ids is not None else "a whole table"
            raise AdapterError(
                f"has {what} {tuple(rows.shape)} of {name}", where=str(adapter.folder),
                why=f"this model's are {', '.join(f'{n} ({_count(m)}, {width})' for n, m in tables.items())}",
                fix="Give the base that the adapter was trained on",
            )  # fmt: skip
        own = nn.Parameter(rows.float(), requires_grad=False)
        shared = tied and (ids is not None or bool(adapter.config.get("ensure_weight_tying")))
        if not shared or name == next(iter(tables)):
            for table in tables if shared else [name]:
                _place(model, table, own, ids)
    _check_covered(model, adapter)


def _check_covered(model: PreTrainedModel, adapter: Adapter) -> None:
    """AdapterError where embedding or head has grown for a token and the adapter has its row in the other alone."""
    ids = list(tokens_of(adapter).ids)
    for name, module in _tables(model).items() if ids else ():
        if not isinstance(model.get_submodule(name), TrainedRows) and not rows_of(module, ids).any(1).all():
            raise AdapterError(
                f"has no rows of {name} for its new tokens", where=str(adapter.folder), why="nor has the base",
                fix="Train rows of both, as lora.trainable_tokens does",
            )  # fmt: skip


def rows_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained rows of `model`, in PEFT's wrapper, under the names of PEFT's files: there rows of tokens that are
    shared stand once, tables twice."""
    state, seen = {}, set()
    for name, module in _trained(model):
        if module.ids is None:
            state[f"{name}.weight"] = module.rows.data
        elif id(module.rows) not in seen:
            state[f"{name}{ROWS}"] = module.rows.data
            seen.add(id(module.rows))
    return state


@torch.no_grad()
def load_rows(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set the trained rows to those in `state`; what else is in it."""
    own = rows_state(model)
    for name, rows in own.items():
        rows.copy_(state[name])
    return {name: tensor for name, tensor in state.items() if name not in own}


def rare_rows(model: nn.Module) -> set[int]:
    """`id` of parameters that get a gradient only from samples that have their tokens."""
    heads = {id(module.rows) for _, module in _trained(model) if isinstance(module, TrainedHead)}
    return {id(module.rows) for _, module in _trained(model) if module.ids is not None} - heads


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one table."""
    embedding, head = (_inside(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    return not isinstance(embedding, RowEmbedding) and weight_of(embedding).data_ptr() == weight_of(head).data_ptr()


def _tables(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Input embedding and output head by their names, in this order. Raises ConfigError for a head we cannot train."""
    head = _inside(model.get_output_embeddings())
    if type(head) not in (nn.Linear, FrozenLinear) or getattr(head, "bias", None) is not None:
        raise ConfigError(
            "are not possible for this architecture", where="lora.trainable_tokens, lora.modules_to_save",
            why=f"its output head is a {type(head).__name__}{' with a bias' if type(head) is nn.Linear else ''}",
        )  # fmt: skip
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(m)]: _inside(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}


def _place(model: PreTrainedModel, name: str, rows: nn.Parameter, ids: tuple[int, ...] | None) -> None:
    module = model.get_submodule(name)
    head = module is model.get_output_embeddings()
    device = model.get_output_embeddings().weight.device
    if rows.device != device:
        rows.data = rows.data.to(device)
    where = None if ids is None else torch.tensor(ids, device=device)
    trained = TrainedHead(module, rows, where) if head else TrainedEmbedding(module, rows, where)
    (model.set_output_embeddings if head else model.set_input_embeddings)(trained)


def _all_rows(module: nn.Module, tokens: Tokens) -> Tensor:
    rows = torch.empty(_count(module), _width(module))
    for few in torch.arange(len(rows)).split(AT_ONCE):
        rows[few] = rows_of(module, few.tolist()).cpu()
    new = tuple(tokens.pieces)
    if new:
        rows[list(new)] = begin(module, Tokens(new, tokens.pieces)).cpu()
    return rows


def _trained(model: nn.Module) -> Iterator[tuple[str, TrainedRows]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TrainedRows))


def _inside(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, TrainedRows) else module


def _count(module: nn.Module) -> int:
    return module.num_embeddings if isinstance(module, RowEmbedding) else len(weight_of(module))


def _width(module: nn.Module) -> int:
    return module.embedding_dim if isinstance(module, RowEmbedding) else int(weight_of(module).shape[1])


def _last(name: str) -> str:
    return name.rpartition(".")[2]
