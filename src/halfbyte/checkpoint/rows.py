"""Of an adapter's file: rows of tokens (PEFT's `trainable_token_indices`) and whole tables (`modules_to_save`).

base_model.model.<module>.token_adapter.trainable_tokens_delta     (n, hidden_size), a row for each index
base_model.model.<module>.weight                                   (vocabulary, hidden_size); of tied ones
                                                                   (`ensure_weight_tying`) each, though one is named
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from halfbyte.config.names import matches

ROWS = ".token_adapter.trainable_tokens_delta"
"""How the name of rows ends."""
_PREFIX, _WHOLE = "base_model.model.", ".weight"


Rows = dict[str, tuple[tuple[int, ...] | None, Tensor]]
"""By module: the tokens whose rows these are, None for all, and the rows."""


def token_rows(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Rows:
    """Of a checked adapter."""
    found: Rows = {}
    for name, tensor in state.items():
        module = module_of(name, config)
        if module is not None:
            found[module] = indices_of(config, module) if name.endswith(ROWS) else None, tensor
    return found


def has_rows(config: Mapping[str, Any]) -> bool:
    """Whether an adapter of this config has rows or tables of its own."""
    return bool(config.get("trainable_token_indices") or config.get("modules_to_save"))


def module_of(name: str, config: Mapping[str, Any]) -> str | None:
    """The module whose rows the tensor `name` has; None for a tensor of another kind."""
    if not name.startswith(_PREFIX):
        return None
    if name.endswith(ROWS) and config.get("trainable_token_indices"):
        return name.removeprefix(_PREFIX).removesuffix(ROWS)
    module = name.removeprefix(_PREFIX).removesuffix(_WHOLE)
    whole = config.get("modules_to_save")
    whole = tuple(want for want in whole if isinstance(want, str)) if isinstance(whole, list | tuple | set) else ()
    named = matches(module, whole) or (bool(whole) and bool(config.get("ensure_weight_tying")))
    return module if name.endswith(_WHOLE) and ".lora_" not in name and named else None


def indices_of(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The tokens whose rows of `module` are trained, as PEFT has it: for one module, or by the end of its name."""
    indices = config["trainable_token_indices"]
    if isinstance(indices, dict):
        indices = next((value for key, value in indices.items() if matches(module, (key,))), ())
    return tuple(indices)


def row_problems(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    """What keeps an adapter's rows and tables from being what its config says, a phrase each."""
    indices, whole = config.get("trainable_token_indices") or (), config.get("modules_to_save") or ()
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    if not all(isinstance(ids, list | tuple) and all(type(i) is int and i >= 0 for i in ids) for ids in lists):
        return [f"trainable_token_indices is {indices!r}, not a list of tokens"]
    if not isinstance(whole, list | tuple | set) or not all(isinstance(name, str) for name in whole):
        return [f"modules_to_save is {whole!r}, not a list of names"]
    found, there = [], {}
    for name, tensor in state.items():
        module = module_of(name, config)
        if module is None:
            continue
        there[module] = name.endswith(ROWS)
        if tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.numel():
            found.append(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not a matrix of floats")
        elif there[module]:
            ids = indices_of(config, module)
            if len({*ids}) != len(tensor) or len(ids) != len(tensor):
                found.append(f"{name} has {len(tensor)} rows for {len(ids)} tokens")
    found += [f"{name} of modules_to_save is not there" for name in whole
              if not any(matches(module, (name,)) for module, rows in there.items() if not rows)]  # fmt: skip
    if any(lists) and not any(there.values()):
        found.append("the rows of trainable_token_indices are not there")
    return found
