"""A base model's folder and config.json, within bounds: who builds a model from it believes every number in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from halfbyte.config.limits import check_limit
from halfbyte.errors import ModelError, read_error

_SIZES = {
    "num_hidden_layers": "layers", "n_layer": "layers",
    **dict.fromkeys((
        "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "num_attention_heads", "n_head",
        "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "n_positions",
    ), "size"),
}  # fmt: skip
"""Numbers that memory and time are spent on, by the limit they have."""


def read_model_config(path: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        ModelError: not there, beyond the limits, no JSON object, or a size that no model has.
        ResourceError: the disk fails.
    """
    try:
        check_limit("json_bytes", path.stat().st_size, "bytes", path)
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise read_error(ModelError, path, error) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, _NumberError) as error:
        raise ModelError("the config cannot be read", where=str(path), why=str(error)) from None
    if not isinstance(config, dict):
        raise ModelError("the config cannot be read", where=str(path), why="it is no JSON object")
    check_sizes(config, str(path))
    return config


def check_links(folder: Path) -> None:
    """See that no file of `folder` is a link out of it; the hub's cache links into its own `blobs`.

    Raises:
        ModelError: names the first that is.
    """
    home = folder.resolve()
    inside = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.resolve().parent not in (home, inside):
            raise ModelError(
                "is a link that leads out of the model's folder", where=str(path),
                fix="Put the file itself there, or give the folder it lies in",
            )  # fmt: skip


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """See that sizes are from 1 to their limit; what is no whole number is for those who know what belongs there.

    Raises:
        ModelError: names the first that is not.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name, limit in _SIZES.items():
            value = part.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                if value < 1:
                    raise ModelError(f"{name} is {value}", where=where, why="it is at least 1")
                check_limit(limit, value, f"as {name}", where)


class _NumberError(ValueError):
    """NaN or an infinity where JSON has none."""


def _no_number(text: str) -> NoReturn:
    raise _NumberError(f"{text} is no JSON")
