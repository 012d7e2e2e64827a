"""What an adapter adds to each weight, as its two factors; never a whole matrix unless it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.checkpoint import Adapter
from halfbyte.errors import AdapterError


@dataclass(frozen=True)
class Update:
    """``scaling * B A`` of one layer: a (r, in), b (out, r) float32, b already scaled."""

    a: Tensor
    b: Tensor

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of the update, float32."""
        return self.b[start:stop] @ self.a


Updates = Mapping[str, Update]
"""By the name of the parameter they are added to."""


def updates_of(adapter: Adapter, model: PreTrainedModel) -> Updates:
    """The updates of `adapter` for `model`, a skeleton; PEFT says what goes where, and how large it is.

    Raises:
        AdapterError: tensors and layers do not match one to one; a layer that is not a plain linear one.
    """
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import LoraLayer

    from halfbyte.model.adapt import adapter_state, check_fit, wrap

    adapted = wrap(model, adapter, on_meta=True)
    check_fit(adapter_state(adapted), adapter.state, str(adapter.folder))
    updates = {}
    for name, layer in adapted.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, Linear):
            kind = type(layer.get_base_layer()).__name__
            raise AdapterError(f"changes {name}, a {kind}", where=str(adapter.folder), why="only linear layers merge")
        a, b = (adapter.state[f"base_model.model.{name}.lora_{which}.weight"].float() for which in "AB")
        updates[f"{name}.weight"] = Update(a, b * layer.scaling["default"])
    adapted.base_model.unload()  # the skeleton as it was
    return updates
