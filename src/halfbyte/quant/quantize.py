"""A weight into 4 bits: whole, or slice by slice, so that it need never be whole in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import prod

import torch
from torch import Tensor

from halfbyte.config.base import QuantConfig
from halfbyte.config.formats import bits_of, constants_of
from halfbyte.errors import ModelError
from halfbyte.quant.absmax import compress_absmax
from halfbyte.quant.blocks import NESTED_BLOCKSIZE, num_code_bytes
from halfbyte.quant.codebook import codebook
from halfbyte.quant.memory import lasting
from halfbyte.quant.offsets import range_constants
from halfbyte.quant.scales import codes_for_scales, double_quantized, least_error_scales, peak_scales
from halfbyte.quant.weight import SOURCE_DTYPES, QuantizedWeight


def quantize(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    scale: str = "auto",
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize `weight` to 4 bits.

    Args:
        weight: any shape; float32, bfloat16 or float16; every element finite.
        scale: of a block: "mse-signed" (of least squared error and either sign), "mse", "absmax" (the largest
            magnitude: bitsandbytes' own bytes), or "auto": mse-signed, but absmax of int8.
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

    The weight is held whole where `config.whole_weights` says so; else no more than a slice of it and 256 blocks.
    """

    def __init__(
        self, slices: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype, config: QuantConfig, *, name: str,
        importance: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.shape = shape
        self._slices, self._dtype, self._config, self._name = slices, dtype, config, name
        self._importance, self._taken = importance, 0
        self._constants, self._signed = constants_of(config.quant_type), config.chosen_scale == "mse-signed"
        self._scales: list[Tensor] = []
        self._compressed: list[tuple[Tensor, Tensor, float]] = []
        self._bad = 0

    def codes(self) -> Iterator[Tensor]:
        """The codes of each slice, flat; in one piece where the weight is held whole."""
        config = self._config
        by_peak = config.chosen_scale == "absmax" and self._constants == 1
        if by_peak and not codebook(config.quant_type, config.blocksize).signed:
            for part in self._parts():
                codes, scales = torch.ops.halfbyte.quantize_4bit(part, config.quant_type, config.blocksize)
                self._check(scales, part)
                self._scales.append(scales)
                yield codes
        elif config.whole_weights:
            yield self._nearest(self._whole())
        else:
            yield from map(self._nearest, self._groups() if config.double_quant else self._parts())

    def _parts(self) -> Iterator[Tensor]:
        for part in map(Tensor.detach, self._slices):
            if part.dtype not in SOURCE_DTYPES:
                why = "float32, bfloat16 and float16 are supported"
                raise ModelError(f"has dtype {part.dtype}", where=self._name, why=why)
            yield part

    def _groups(self) -> Iterator[Tensor]:
        """The weight, flat, in pieces of whole groups of blocks, which double quantization takes together."""
        group, count, seen = NESTED_BLOCKSIZE * self._config.blocksize, prod(self.shape), 0
        rest: Tensor | None = None
        for part in self._parts():
            seen += part.numel()
            flat = part.reshape(-1) if rest is None else torch.cat([rest, part.reshape(-1)])
            stop = flat.numel() if seen == count else flat.numel() // group * group
            rest = flat[stop:].clone() if stop < flat.numel() else None  # the next slice overwrites this one
            if stop or seen == count:
                yield flat[:stop]

    def _whole(self) -> Tensor:
        weight, filled = None, 0
        for part in self._parts():
            if part.numel() == prod(self.shape):
                return part
            weight = part.new_empty(prod(self.shape)) if weight is None else weight
            weight[filled : filled + part.numel()] = part.reshape(-1)
            filled += part.numel()
        assert weight is not None
        return weight

    def _check(self, scales: Tensor, part: Tensor) -> None:
        # NaN or Inf in a block shows in its scale, so the weights need no second pass unless something is wrong.
        if not scales.sum().isfinite():
            self._bad += int((~torch.isfinite(part)).sum())

    def _nearest(self, part: Tensor) -> Tensor:
        """Codes for the scales as they are decoded, not as they were wished."""
        config, scales = self._config, self._wished(part)
        self._check(scales, part)
        if config.double_quant and not self._bad:
            compressed, scales = double_quantized(scales, self._constants, centred=config.whole_weights)
            self._compressed.append(compressed)
        else:
            self._scales.append(scales)
        return codes_for_scales(part, scales, config.quant_type, config.blocksize)

    def _wished(self, part: Tensor) -> Tensor:
        config, importance = self._config, self._importance
        if importance is not None:
            importance = importance.roll(-(self._taken % len(importance)))
        self._taken += part.numel()
        if config.chosen_scale == "absmax":
            return (peak_scales if self._constants == 1 else range_constants)(part, config.blocksize)
        return least_error_scales(
            part, config.quant_type, config.blocksize, signed=self._signed, importance=importance
        )

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """The weight, once `codes()` has been used up; `codes` is all of them, or a meta tensor in their place.

        Raises:
            ModelError: the slices held NaN or Inf.
        """
        if self._bad:
            fix = "Use a checkpoint whose weights are finite"
            raise ModelError(f"has {self._bad} NaN or Inf", where=self._name, fix=fix)
        nested_absmax, offset = None, 0.0
        if self._compressed:
            scales, nested, offsets = zip(*self._compressed, strict=True)
            absmax, nested_absmax, offset = _joined(scales), _joined(nested), offsets[0]
        else:
            absmax = _joined(self._scales)
            if self._config.double_quant:
                absmax, nested_absmax, offset = compress_absmax(absmax)
        return QuantizedWeight(
            codes=codes, absmax=absmax, nested_absmax=nested_absmax, nested_offset=offset,
            quant_type=self._config.quant_type, blocksize=self._config.blocksize, shape=self.shape, dtype=self._dtype,
        )  # fmt: skip


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
