"""Which experts get layers of their own, and what these are called: as in the files, which transformers joins."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
)

from halfbyte.nn.experts import experts_of, is_covered, joined_name, layers_of, split, use_split_experts

_SOURCE = re.compile(r"(?P<place>[\w.]*experts)\.\*\.(?P<layer>\w+)\.weight")
"""A pattern of transformers' for the weights of all experts of a layer."""


def split_experts(model: PreTrainedModel, left: Iterable[str] = ()) -> bool:
    """Give every expert of `model`, a skeleton, linear layers of its own: all experts of the model or none, because
    they compute in one way.

    Args:
        left: modules of experts that stay as they are.

    Returns:
        Whether they have them.
    """
    found = {name: module for name, module in model.named_modules() if hasattr(module, "is_transposed")}
    if not found or set(found) & set(left) or not all(map(is_covered, found.values())):
        return False
    for name, module in found.items():
        split(module, _layers(model, name) or ("gate_proj", "up_proj", "down_proj")[0 if module.has_gate else 1 :])
    use_split_experts(model)
    return True


def expert_layers(model: nn.Module) -> set[str]:
    """What experts call their linear layers: gate_proj, or w1, and so on; empty where they have none of their own."""
    return {name for module in model.modules() for name in layers_of(module)}


def joins_experts(conversion: object) -> bool:
    """Whether a conversion of transformers puts the weights of many experts into one tensor."""
    return isinstance(conversion, WeightConverter) and all(map(_SOURCE.fullmatch, conversion.source_patterns))


def by_new_name(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The names of tensors in files by what transformers calls them, where experts have layers of their own."""
    if not expert_layers(model):
        return {name: name for name in stored}
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    return {apply_renamings(name, renamings): name for name in stored}


def joined_weights(model: nn.Module) -> dict[str, list[str]]:
    """The 3-D weights that transformers has in the place of experts' own, each with theirs, expert by expert."""
    found = {}
    for place, module in model.named_modules():
        if layers := layers_of(module):
            for name, parts in ((joined_name(module), layers[:-1]), ("down_proj", layers[-1:])):
                count = len(experts_of(module))
                found[f"{place}.{name}"] = [f"{place}.{e}.{part}.weight" for e in range(count) for part in parts]
    return found


def _layers(model: PreTrainedModel, module: str) -> tuple[str, ...]:
    """What files call the layers of the experts in `module`, the one to the back last; empty if they have none."""
    first, down = list[str](), list[str]()
    for conversion in filter(joins_experts, get_model_conversion_mapping(model, add_legacy=False)):
        matches = [_SOURCE.fullmatch(source) for source in conversion.source_patterns]
        kinds = [type(operation) for operation in conversion.operations]
        wanted = [MergeModulelist, Concatenate][: 2 if len(matches) > 1 else 1]
        if kinds == wanted and all(match and module.endswith(match["place"]) for match in matches):
            part = down if conversion.target_patterns[0].endswith(".down_proj") else first
            part += [match["layer"] for match in matches if match]
    return (*first, *down) if first and len(down) == 1 else ()
