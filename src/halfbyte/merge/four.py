"""A merged model in bitsandbytes' 4-bit format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from halfbyte.checkpoint.shard_writer import ShardWriter
from halfbyte.config import QuantConfig
from halfbyte.merge.fold import Fold
from halfbyte.merge.sixteen import kept
from halfbyte.quant import QuantizedWeight, quantize_slices
from halfbyte.quant.error_feedback import round_with_feedback
from halfbyte.quant.moments import Moments


@dataclass(frozen=True)
class FourBitShards:
    """`Output` in `recipe`: codebook, block size, double quantization."""

    fold: Fold
    recipe: QuantConfig
    shards: ShardWriter

    def keep(self, name: str) -> None:
        """As it is stored."""
        self.shards.add(self.fold.base.file_name(name), kept(self.fold, name))

    def nearest(self, name: str, target: Tensor) -> None:
        """Every weight to its nearest code."""
        self._add(name, self._plain(name, target))

    def round(self, name: str, target: Tensor, moments: Moments) -> Callable[[], Tensor]:
        """Codes by error feedback, to the scales of the nearest ones."""
        weight = round_with_feedback(moments.wanted(target), moments, self._plain(name, target))
        self._add(name, weight)
        return partial(weight.dequantize, torch.float32)

    def _plain(self, name: str, target: Tensor) -> QuantizedWeight:
        recipe = replace(self.recipe, quant_type=self.fold.base.format_of(name))  # type: ignore[arg-type]
        return quantize_slices([target], tuple(target.shape), target.dtype, recipe, name=name)

    def _add(self, name: str, weight: QuantizedWeight) -> None:
        weight, written = replace(weight, dtype=self.fold.base.dtype()), self.fold.base.file_name(name)
        self.shards.add(written, weight.codes.view(-1, 1))
        for key, tensor in weight.bnb_tensors().items():
            self.shards.add(f"{written}.{key}", tensor)
