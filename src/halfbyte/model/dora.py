"""DoRA in PEFT's layers, its magnitudes from the 4-bit bytes: PEFT would copy and decode each weight, whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from halfbyte.errors import AdapterError
from halfbyte.nn.dora import row_norms
from halfbyte.nn.layer_spec import Projection
from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.streamed import StreamedLayer


def use_dora(model: PeftModel, name: str) -> None:
    """Make the plain LoRA adapter `name` of `model` a DoRA adapter that computes what the model does now."""
    for layer, norms in _norms(model, name):
        if not layer.lora_magnitude_vector:
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_magnitude_vector")
        dora = DoraLinearLayer(fan_in_fan_out=getattr(layer, "fan_in_fan_out", False))
        dora.weight = nn.Parameter(norms, requires_grad=layer.lora_A[name].weight.requires_grad)
        layer.lora_magnitude_vector[name] = dora
        layer.lora_variant[name], layer.use_dora[name] = DoraLinearVariant(), True
    model.peft_config[name].use_dora = True


def reset_magnitudes(model: PeftModel, name: str = "default") -> None:
    """Set the magnitudes to the rows' present lengths: after A and B were set to a start."""
    for layer, norms in _norms(model, name):
        layer.lora_magnitude_vector[name].weight.data.copy_(norms)


def _norms(model: PeftModel, name: str) -> Iterator[tuple[LoraLayer, Tensor]]:
    """Each layer with the adapter `name`, and the lengths of its rows; streamed ones while their bytes are there."""
    done: set[int] = set()
    for module in list(model.modules()):
        streamed = getattr(module, "streamed", None)
        if isinstance(streamed, StreamedLayer) and not isinstance(module, LoraLayer):
            inside = [sub for sub in module.modules() if isinstance(sub, LoraLayer) and name in sub.lora_A]
            with streamed.in_memory():
                for layer in inside:
                    done.add(id(layer))
                    yield layer, _norms_of(layer, name)
    for module in list(model.modules()):
        if isinstance(module, LoraLayer) and name in module.lora_A and id(module) not in done:
            yield module, _norms_of(module, name)


@torch.no_grad()
def _norms_of(layer: LoraLayer, name: str) -> Tensor:
    base, scaling = layer.get_base_layer(), layer.scaling[name]
    lora_A, lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
    if isinstance(base, Linear4bit) and not base.weight.is_meta:
        return row_norms(Projection(base, lora_A, lora_B, scaling))
    weight = base.weight.T if getattr(layer, "fan_in_fan_out", False) else base.weight
    if weight.dim() != 2:
        raise AdapterError("is not possible", where="lora.use_dora", why=f"{type(base).__name__} is no linear layer")
    norms: Tensor = torch.linalg.norm(weight.float() + scaling * lora_B @ lora_A, dim=1)
    return norms
