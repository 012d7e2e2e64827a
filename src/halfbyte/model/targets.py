"""Which modules are quantized, and which get an adapter."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.config.names import check_skipped, check_targets, matches
from halfbyte.model.experts import expert_layers
from halfbyte.nn import Linear4bit


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers, transformers' Conv1D among them."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def modules_to_quantize(model: PreTrainedModel, skip_modules: tuple[str, ...]) -> list[str]:
    """Names of the linear layers to hold in 4 bits: all but the output head, tied ones and `skip_modules`.

    Raises:
        ConfigError: an entry of `skip_modules` names nothing.
    """
    linears = linear_names(model)
    check_skipped(skip_modules, linears)
    tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    return [
        name for name in linears if modules[name] is not head and name not in tied and not matches(name, skip_modules)
    ]


def modules_to_adapt(model: PreTrainedModel, target_modules: str | tuple[str, ...]) -> list[str]:
    """Full names of the layers that get an adapter; in a mixture none that is called as an expert's is, outside of
    the experts too: PEFT takes these names for all experts' (`target_parameters`), which it adapts in 16 bits only.

    Raises:
        ConfigError: a name matches no linear layer (or only the output head, whose adapter would need all logits; or
            only experts').
    """
    head, experts = model.get_output_embeddings(), expert_layers(model)
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    linears = [name for name in linears if name.rpartition(".")[2] not in experts]
    if target_modules == "all-linear":
        return [name for name in linears if isinstance(model.get_submodule(name), Linear4bit)] or linears
    check_targets(target_modules, linears, experts)
    return [name for name in linears if matches(name, tuple(target_modules))]
