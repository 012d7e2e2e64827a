"""The merged weights, exactly: a base's values plus the adapter's update in float32, slice by slice or whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.merge.base import MergeBase, open_base
from halfbyte.merge.tables import Tables, with_rows
from halfbyte.merge.update import Updates

NEAR = 0.25
"""Largest distance of a 16-bit weight from its 4-bit form, as a part of its norm, that is taken for quantization: NF4
of a Gaussian is 0.092 away, FP4 0.12; another model's weight is 1.4 away."""


@dataclass(frozen=True)
class Fold:
    """Base + adapter, tensor by tensor; parameters by the names of `base`.

    Attributes:
        original: whose 16-bit weights the updates are added to; None: the decoded 4-bit weights of `base`.
        tables: the trained rows of embedding and head.
    """

    base: MergeBase
    updates: Updates
    original: MergeBase | None = None
    tables: Tables = field(default_factory=dict)

    @property
    def trained_rows(self) -> dict[str, int]:
        """How many rows `tables` has, by parameter."""
        return {name: len(rows) for name, (_, rows) in self.tables.items()}

    @property
    def onto(self) -> str:
        """ "quantized" or "original"."""
        return "quantized" if self.original is None else "original"

    def slices(self, name: str, max_elements: int) -> Iterator[Tensor]:
        """Parameter `name`, one of the base's targets, in whole rows and in the orientation of nn.Linear."""
        update, start = self.updates.get(name), 0
        if self.original is None:
            parts = (part.dequantize(torch.float32) for part in self.base.quantized(name).row_slices(max_elements))
        else:
            parts = (part.float() for part in self.original.original_slices(name))
        for values in parts:
            if update is not None:
                update.add_to(values, start)
            start += len(values)
            yield values

    def whole(self, name: str) -> Tensor:
        """`slices` as one tensor."""
        if self.original is not None:
            return torch.cat(list(self.slices(name, 0)))
        values = self.base.quantized(name).dequantize(torch.float32)
        update = self.updates.get(name)
        return values if update is None else update.add_to(values)

    def unquantized(self, name: str) -> Tensor:
        """Parameter `name`, none of the targets, as it is stored; in float32 with an update or trained rows."""
        stored = (self.original or self.base).unquantized(name)
        if name in self.tables:
            return with_rows(stored, self.tables[name])
        update = self.updates.get(name)
        if update is None:
            return stored
        values = stored.to(torch.float32, copy=True)
        return update.add_to(values.T.contiguous()).T if self.base.is_transposed(name) else update.add_to(values)

    def weight(self, name: str) -> Tensor:
        """Any parameter, as transformers has it: `Weights` for `LentModel`."""
        if name not in self.base.targets:
            return self.unquantized(name)
        values = self.whole(name)
        return values.T.contiguous() if self.base.is_transposed(name) else values


def open_original(base: MergeBase, path: str) -> MergeBase:
    """The 16-bit weights that `base` was quantized from: those of `path`, else its own files.

    Raises:
        ModelError: there are none, or they are not what was quantized.
    """
    original = open_base(path, base.quant) if path else base
    if original.in_4_bits:
        raise ModelError(
            "holds quantized weights", where=original.source.label,
            why="the update is to be added to the original ones",
            fix="Give the 16-bit model with --original, or merge with --base quantized",
        )  # fmt: skip
    wrong = set(base.names) ^ set(original.names)
    if wrong:
        raise ModelError(
            f"has not the tensors of {base.source.label}", where=path, why=f"{min(wrong)} is in one of them only"
        )
    return original


def check_near(base: MergeBase, original: MergeBase) -> float:
    """See that `original` is what `base` was quantized from, on one weight of it.

    Returns:
        Their distance, as a part of the weight's norm.

    Raises:
        ModelError: they are further apart than quantization takes them.
    """
    name = min(base.targets)
    decoded = base.quantized(name).dequantize(torch.float32)
    given = torch.cat([part.float() for part in original.original_slices(name)])
    distance = float((decoded - given).norm() / given.norm().clamp(min=1e-30))
    if not distance <= NEAR:
        raise ModelError(
            f"is not what {base.source.label} was quantized from", where=original.source.label,
            why=f"{name} is {distance:.0%} of its norm away, quantization takes it about 9 %",
            fix="Give the 16-bit model that the base was made of",
        )  # fmt: skip
    return distance
