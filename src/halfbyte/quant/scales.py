"""A block's scale of least squared error in place of its largest magnitude: the same codebook, files and kernels.

A scale may be negative: NF4 has eight steps above zero and seven below, so a block whose largest magnitude is negative
is better turned around. Each candidate's scale is replaced by the best one for its codes, in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.config.formats import bits_of, constants_of
from halfbyte.quant.absmax import TINY, compress_absmax, expand_absmax, scales_and_offsets
from halfbyte.quant.blocks import num_blocks
from halfbyte.quant.codebook import Codebook, codebook
from halfbyte.quant.inverse import add_product
from halfbyte.quant.nibbles import pack_codes
from halfbyte.quant.offsets import least_error_constants

FACTORS = (0.66, 0.72, 0.78, 0.84, 0.90, 0.96, 1.02, 1.08)
"""Candidates, as parts of the largest magnitude; what is between them is found in closed form."""
NARROW_FACTORS = (0.36, 0.42, 0.48, 0.54, 0.60, *FACTORS)
"""With up to eight values, where it pays to cut more off."""
FLOOR = 1e-3
"""Least importance of a column, as a part of their mean: a column that never fired in calibration may fire later."""
RIDGE = 1e-4
"""Added to the diagonal of the equations for a row's scales, as a part of its mean."""
FITTED = 1 << 21
"""Weights of rows whose scales are fitted at a time: products of these fit into a large cache."""
CHUNK = 1 << 18
"""Weights that are worked on at a time: they and what is made of them fit into a cache."""


def least_error_scales(
    weight: Tensor, quant_type: str, blocksize: int, *, signed: bool, importance: Tensor | None = None
) -> Tensor:
    """The scales s of least sum over a block of ``importance * (weight - s * value of its code)^2``.

    Args:
        weight: any shape and float dtype.
        signed: whether a scale may be negative.
        importance: (weight.shape[-1],) float32, at least 0; None: all alike.

    Returns:
        (ceil(n/blocksize),) float32; 0 for a block of zeros; not finite where the weight is not. Of int4-asym each has
        its offset after it, whatever `signed` says.
    """
    if importance is not None:
        importance = importance.clamp(min=FLOOR * float(importance.mean()) + TINY)
    scales: Tensor = torch.ops.halfbyte.least_error_scales(weight, quant_type, blocksize, signed, importance)
    return scales


def peak_scales(weight: Tensor, blocksize: int) -> Tensor:
    """(ceil(n/blocksize),) float32: of each block the weight of largest magnitude, with its sign."""
    blocks = _blocks(weight.reshape(-1).float(), blocksize)
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).view(-1)


def least_error_scales_reference(
    weight: Tensor, quant_type: str, blocksize: int, signed: bool, importance: Tensor | None
) -> Tensor:
    """The operator `least_error_scales` in plain torch: `least_error_scales`, `importance` above 0."""
    if constants_of(quant_type) > 1:
        return least_error_constants(weight, blocksize, importance)
    flat, table = weight.detach().reshape(-1), codebook(quant_type, blocksize)
    scales = flat.new_empty(num_blocks(flat.numel(), blocksize), dtype=torch.float32)
    step = max(_chunk(flat) // blocksize, 1)
    for first in range(0, len(scales), step):
        start, stop = first * blocksize, min((first + step) * blocksize, flat.numel())
        w = _blocks(flat[start:stop].float(), blocksize)
        h = None
        if importance is not None:
            h = _blocks(importance[torch.arange(start, stop, device=flat.device) % len(importance)], blocksize)
        scales[first : first + step] = _best(w, h, table, signed)
    return scales


def codes_for_scales(weight: Tensor, scales: Tensor, quant_type: str, blocksize: int) -> Tensor:
    """Packed: the nearest code of every weight to the `scales`, and offsets, that it is decoded with (`absmax`)."""
    codes: Tensor = torch.ops.halfbyte.codes_for_scales(weight, scales, quant_type, blocksize)
    return codes


def codes_for_scales_reference(weight: Tensor, scales: Tensor, quant_type: str, blocksize: int) -> Tensor:
    """The operator `codes_for_scales` in plain torch."""
    scales, offsets = scales_and_offsets(scales, None, 0.0, quant_type)
    flat, table = weight.detach().reshape(-1), codebook(quant_type, blocksize)
    codes = flat.new_empty(flat.numel(), dtype=torch.uint8)
    bounds, order = table.boundaries.to(flat.device), table.order.to(flat.device)
    chunk = _chunk(flat)
    for start in range(0, flat.numel(), chunk):
        w = _blocks(flat[start : start + chunk].float(), blocksize)
        if offsets is not None:
            w = w - offsets[start // blocksize :][: len(w), None]
        ranks = torch.bucketize(w * _inverse(scales[start // blocksize :][: len(w)])[:, None], bounds)
        part = codes[start : start + chunk]
        part.copy_(order[ranks.view(-1)[: len(part)]])
    return pack_codes(codes, bits_of(quant_type), table.zero_code)


def double_quantized(
    scales: Tensor, constants: int = 1, *, centred: bool = True
) -> tuple[tuple[Tensor, Tensor, float], Tensor]:
    """`compress_absmax`, and what the scales are decoded to."""
    compressed = compress_absmax(scales, constants, centred=centred)
    return compressed, expand_absmax(*compressed, constants)


def fitted_scales(pull: Tensor, values: Tensor, moments: Tensor, blocksize: int) -> Tensor:
    """How scales change to those of least ||x wanted^T - x W^T||, W being `values` times them: all of a row's at once.

    Args:
        pull: (out, in) float32, (wanted - W) moments, W with the scales before; in a multiple of `blocksize`.
        values: (out, in) float32, what its codes mean.
        moments: (in, in) float32, x^T x: symmetric.

    Returns:
        (out * in / blocksize,) float32.
    """
    size, (rows, columns) = blocksize, values.shape
    count = columns // size
    changes = torch.empty(rows, count)
    step = max(FITTED // columns, 1)
    memory = torch.empty(step, columns)
    for start in range(0, rows, step):
        part = values[start : start + step]
        squares = torch.empty(len(part), count, count)
        for b in range(count):
            first, stop = b * size, (b + 1) * size
            products = memory[: len(part), first:].zero_()
            add_product(products, part[:, first:stop], moments[first:stop, first:])
            sums = products.mul_(part[:, first:]).unflatten(1, (count - b, size)).sum(2)
            squares[:, b, b:] = squares[:, b:, b] = sums
        goal = (pull[start : start + step] * part).view(len(part), count, size).sum(2)
        diagonal = squares.diagonal(dim1=1, dim2=2)
        diagonal.add_(RIDGE * diagonal.mean(1, keepdim=True) + TINY)
        changes[start : start + step] = torch.linalg.solve(squares, goal)
    return changes.view(-1)


def factors_of(table: Codebook, signed: bool) -> tuple[float, ...]:
    """The candidates, of both signs with `signed`."""
    factors = tuple(factor / table.top for factor in (FACTORS if table.values.numel() > 8 else NARROW_FACTORS))
    return factors + tuple(-factor for factor in factors) if signed else factors


def _best(w: Tensor, h: Tensor | None, table: Codebook, signed: bool) -> Tensor:
    """Of the blocks w (blocks, blocksize), their columns weighted by `h`."""
    levels, bounds = table.levels.to(w.device), table.boundaries.to(w.device)
    peak, weighted = w.abs().amax(1), w if h is None else w * h
    best, scales = torch.full_like(peak, -1.0), torch.zeros_like(peak)
    for factor in factors_of(table, signed):
        values = levels[torch.bucketize(w * _inverse(factor * peak)[:, None], bounds)]
        along = (weighted * values).sum(1)
        norm = (values * values if h is None else values * values * h).sum(1).clamp(min=TINY)
        gain = along * along / norm  # what the error is less than with all codes 0
        better = gain > best
        best = gain.where(better, best)
        scales = (along / norm).where(better, scales)
    return scales.where(peak.isfinite(), peak)


def _chunk(flat: Tensor) -> int:
    return CHUNK if flat.device.type == "cpu" else 16 * CHUNK  # a GPU waits for the launches of small ones


def _inverse(scales: Tensor) -> Tensor:
    return scales.where(scales.abs() >= TINY, 1.0).reciprocal()


def _blocks(flat: Tensor, blocksize: int) -> Tensor:
    short = -flat.numel() % blocksize
    return (torch.nn.functional.pad(flat, (0, short)) if short else flat).view(-1, blocksize)
