"""Which modules are quantized, and which get an adapter."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import ConfigError
from halfbyte.nn import Linear4bit


def matches(name: str, wanted: tuple[str, ...]) -> bool:
    """Whether `name` is one of `wanted`, or ends in one of them after a dot."""
    return any(name == want or name.endswith("." + want) for want in wanted)


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers, transformers' Conv1D among them."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def modules_to_quantize(model: PreTrainedModel, skip_modules: tuple[str, ...]) -> list[str]:
    """Names of the linear layers to hold in 4 bits: all but the output head, tied ones and `skip_modules`.

    Raises:
        ConfigError: an entry of `skip_modules` names nothing.
    """
    linears = linear_names(model)
    for want in skip_modules:
        if not any(matches(name, (want,)) for name in linears):
            raise ConfigError(f"{want!r} names no linear layer", where="quant.skip_modules")
    tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    return [
        name for name in linears if modules[name] is not head and name not in tied and not matches(name, skip_modules)
    ]


def modules_to_adapt(model: PreTrainedModel, target_modules: str | tuple[str, ...]) -> list[str]:
    """Full names of the layers that get an adapter.

    Raises:
        ConfigError: a name matches no linear layer (or only the output head, whose adapter would need all logits).
    """
    head = model.get_output_embeddings()
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if target_modules == "all-linear":
        return [name for name in linears if isinstance(model.get_submodule(name), Linear4bit)] or linears
    missing = [want for want in target_modules if not any(matches(name, (want,)) for name in linears)]
    if missing:
        last_parts = sorted({name.rpartition(".")[2] for name in linears})
        raise ConfigError(
            f"{', '.join(missing)} name no layer that can have an adapter", where="lora.target_modules",
            fix="This model has " + ", ".join(last_parts),
        )  # fmt: skip
    return [name for name in linears if matches(name, tuple(target_modules))]
