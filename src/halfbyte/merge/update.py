"""What an adapter adds to each weight, as its two factors; never a whole matrix unless it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.checkpoint import Adapter
from halfbyte.checkpoint.adapter import MAGNITUDE
from halfbyte.checkpoint.rows import module_of
from halfbyte.errors import AdapterError


@dataclass(frozen=True)
class Update:
    """``B A`` of one layer: a (r, in), b (out, r) float32.

    Attributes:
        scale: what b was multiplied by, PEFT's `scaling`.
        magnitude: of DoRA, (out,): the length that each row has after the update.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    def add_to(self, values: Tensor, start: int = 0) -> Tensor:
        """Rows of the weight from `start` on, float32, updated in place."""
        rows = values.view(len(values), -1)
        rows.addmm_(self.b[start : start + len(values)], self.a)
        if self.magnitude is not None:
            lengths = torch.linalg.norm(rows, dim=1, keepdim=True)
            rows *= self.magnitude[start : start + len(values), None] / lengths
        return values

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of ``B A``, float32."""
        return self.b[start:stop] @ self.a

    @property
    def nbytes(self) -> int:
        """Of both factors."""
        return self.a.nbytes + self.b.nbytes


Updates = Mapping[str, Update]
"""By the name of the parameter they are added to."""
Weighted = Sequence[tuple[float, Updates]]
"""Updates of several adapters, and how much of each."""


def sum_of(parts: Weighted) -> Updates:
    """The weighted sum, exactly: factors side by side, ranks added; the only one as it is where its weight is 1."""
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    return {name: side_by_side(shares) for name, shares in by_layer(parts).items()}


def by_layer(parts: Weighted) -> dict[str, list[tuple[float, Update]]]:
    """For each layer that some of `parts` change, their updates of it."""
    layers: dict[str, list[tuple[float, Update]]] = {}
    for weight, updates in parts:
        for name, update in updates.items():
            layers.setdefault(name, []).append((weight, update))
    return layers


def side_by_side(shares: Sequence[tuple[float, Update]]) -> Update:
    """The weighted sum of updates of one layer, of the sum of their ranks."""
    a = torch.cat([update.a for _, update in shares])
    return Update(a, torch.cat([weight * update.b for weight, update in shares], dim=1))


def updates_of(adapter: Adapter, model: PreTrainedModel) -> Updates:
    """The updates of `adapter` for `model`, a skeleton; PEFT says what goes where, and how large it is.

    Raises:
        AdapterError: tensors and layers do not match one to one; a layer that is not a plain linear one.
    """
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import LoraLayer

    from halfbyte.model.adapt import adapter_state, check_fit, wrap

    adapted = wrap(model, adapter, on_meta=True)
    updating = {name: tensor for name, tensor in adapter.state.items() if module_of(name, adapter.config) is None}
    check_fit(adapter_state(adapted), updating, str(adapter.folder))
    updates = {}
    for name, layer in adapted.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, Linear):
            kind = type(layer.get_base_layer()).__name__
            raise AdapterError(f"changes {name}, a {kind}", where=str(adapter.folder), why="only linear layers merge")
        a, b = (adapter.state[f"base_model.model.{name}.lora_{which}.weight"].float() for which in "AB")
        scale = float(layer.scaling["default"])
        magnitude = adapter.state.get(f"base_model.model.{name}{MAGNITUDE}")
        updates[f"{name}.weight"] = Update(a, b * scale, scale, None if magnitude is None else magnitude.float())
    adapted.base_model.unload()  # the skeleton as it was
    return updates
