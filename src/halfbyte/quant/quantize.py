"""A weight into 4 bits: whole, or slice by slice, so that it need never be whole in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from math import prod

import torch
from torch import Tensor

from halfbyte.config.base import QuantConfig
from halfbyte.config.formats import bits_of, constants_of
from halfbyte.errors import ModelError
from halfbyte.quant.absmax import compress_absmax
from halfbyte.quant.blocks import num_code_bytes
from halfbyte.quant.codebook import codebook
from halfbyte.quant.memory import lasting
from halfbyte.quant.offsets import block_constants
from halfbyte.quant.scales import codes_for_scales, double_quantized, least_error_scales, peak_scales
from halfbyte.quant.weight import SOURCE_DTYPES, QuantizedWeight


def quantize(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    scale: str = "absmax",
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize `weight` to 4 bits.

    Args:
        weight: any shape; float32, bfloat16 or float16; every element finite.
        scale: of a block: "absmax", "mse" (of least squared error) or "mse-signed" (the same, of either sign).
        name: what an error calls it.

    Raises:
        ModelError: the weight has NaN or Inf, or is not a floating-point tensor.
        ConfigError: `quant_type`, `blocksize` or `scale` is not one of those supported.
    """
    return quantize_slices(
        [weight], tuple(weight.shape), weight.dtype, QuantConfig(
            quant_type=quant_type,  # type: ignore[arg-type]
            blocksize=blocksize, double_quant=double_quant, scale=scale,  # type: ignore[arg-type]
        ), name=name,
    )  # fmt: skip


def quantize_slices(
    slices: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype, config: QuantConfig, *, name: str,
    importance: Tensor | None = None,
) -> QuantizedWeight:  # fmt: skip
    """Quantize a weight that arrives in slices of its first dimension, so that it need never be whole in memory.

    Args:
        slices: in order; each but the last holds a multiple of ``2 * blocksize`` elements (see `slice_rows`).
        importance: of each column's error to `config.scale`, (shape[-1],) float32; None: all alike.
    """
    quantizer = SliceQuantizer(slices, shape, dtype, config, name=name, importance=importance)
    parts = quantizer.codes()
    codes, count = next(parts), num_code_bytes(prod(shape), bits_of(config.quant_type))
    if codes.numel() < count:
        whole, filled = lasting(count) if codes.device.type == "cpu" else codes.new_empty(count), 0
        for part in chain([codes], parts):
            whole[filled : filled + part.numel()] = part
            filled += part.numel()
        codes = whole
    return quantizer.finish(codes)


class SliceQuantizer:
    """`quantize_slices` for a caller that takes the codes of each slice away before the next is read.

    The weight is held whole with a `config.scale` other than absmax, for a codebook with signed scales and for one
    with offsets: its codes depend on scales that are known last.
    """

    def __init__(
        self, slices: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype, config: QuantConfig, *, name: str,
        importance: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.shape = shape
        self._slices, self._dtype, self._config, self._name = slices, dtype, config, name
        self._importance = importance
        self._scales: list[Tensor] = []
        self._compressed: tuple[Tensor, Tensor, float] | None = None
        self._bad = 0

    def codes(self) -> Iterator[Tensor]:
        """The codes of each slice, flat; in one piece where the weight is held whole."""
        signed = codebook(self._config.quant_type, self._config.blocksize).signed
        if self._config.chosen_scale != "absmax" or signed or constants_of(self._config.quant_type) > 1:
            yield self._codes_for_scales()
            return
        for part in self._parts():
            codes, scales = torch.ops.halfbyte.quantize_4bit(part, self._config.quant_type, self._config.blocksize)
            self._keep(scales, part)
            yield codes

    def _parts(self) -> Iterator[Tensor]:
        for part in map(Tensor.detach, self._slices):
            if part.dtype not in SOURCE_DTYPES:
                why = "float32, bfloat16 and float16 are supported"
                raise ModelError(f"has dtype {part.dtype}", where=self._name, why=why)
            yield part

    def _keep(self, scales: Tensor, part: Tensor) -> None:
        # NaN or Inf in a block shows in its scale, so the weights need no second pass unless something is wrong.
        if not scales.sum().isfinite():
            self._bad += int((~torch.isfinite(part)).sum())
        self._scales.append(scales)

    def _codes_for_scales(self) -> Tensor:
        """Codes for the scales as they are decoded, not as they were wished."""
        parts, config = [part.clone() for part in self._parts()], self._config  # the next overwrites the last
        weight = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)
        del parts
        if constants_of(config.quant_type) > 1:
            scales = block_constants(weight, config, self._importance)
        elif config.chosen_scale == "absmax":
            scales = peak_scales(weight, config.blocksize)
        else:
            scales = least_error_scales(
                weight, config.quant_type, config.blocksize, signed=config.chosen_scale == "mse-signed",
                importance=self._importance,
            )  # fmt: skip
        self._keep(scales, weight)
        if config.double_quant and not self._bad:
            self._compressed, scales = double_quantized(scales, constants_of(config.quant_type))
        return codes_for_scales(weight, scales, config.quant_type, config.blocksize)

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """The weight, once `codes()` has been used up; `codes` is all of them, or a meta tensor in their place.

        Raises:
            ModelError: the slices held NaN or Inf.
        """
        if self._bad:
            fix = "Use a checkpoint whose weights are finite"
            raise ModelError(f"has {self._bad} NaN or Inf", where=self._name, fix=fix)
        absmax = self._scales[0] if len(self._scales) == 1 else torch.cat(self._scales)
        nested_absmax, offset = None, 0.0
        if self._config.double_quant:
            absmax, nested_absmax, offset = self._compressed or compress_absmax(absmax)
        return QuantizedWeight(
            codes=codes, absmax=absmax, nested_absmax=nested_absmax, nested_offset=offset,
            quant_type=self._config.quant_type, blocksize=self._config.blocksize, shape=self.shape, dtype=self._dtype,
        )  # fmt: skip
