"""QuantizedWeight: codes and scales as one object that is never parted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.config.base import BLOCKSIZES
from halfbyte.config.formats import BNB_TYPES, QUANT_TYPES, STATE_KEYS, bits_of, constants_of, state_key
from halfbyte.errors import ConfigError, ModelError
from halfbyte.quant import ops
from halfbyte.quant.absmax import expand_absmax, scales_and_offsets
from halfbyte.quant.blocks import NESTED_BLOCKSIZE, num_code_bytes, slice_rows
from halfbyte.quant.codebook import codebook, dynamic_map

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a weight may be before quantization."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight matrix in 4 bits, or in as many as its format has.

    Attributes:
        codes: (num_code_bytes(n, bits),) uint8, one after the other, the first in the high bits of the first byte.
        absmax: scale of each block, (ceil(n/blocksize),): float32, or uint8 under double quantization. Of int4-asym
            its offset follows each scale: twice as many.
        nested_absmax: (ceil(len(absmax)/256),) float32 under double quantization, else None.
        nested_offset: what is added to decoded scales under double quantization: their mean, or 0 for either sign.
        quant_type: the codebook, of `config.formats`.
        blocksize: weights to a block.
        shape: of the weight, (out_features, in_features) for a linear layer.
        dtype: of the weight before quantization, and of what `dequantize` returns.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: float
    quant_type: str
    blocksize: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.nested_absmax is not None

    @property
    def bits(self) -> int:
        """Of a code."""
        return bits_of(self.quant_type)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.nbytes for t in (self.codes, self.absmax, self.nested_absmax) if t is not None)

    @property
    def op_args(self) -> tuple[Tensor, Tensor, Tensor | None, float, str, int]:
        """The arguments every ``torch.ops.halfbyte`` operator takes for its weight."""
        return (self.codes, self.absmax, self.nested_absmax, self.nested_offset, self.quant_type, self.blocksize)

    def scales_and_offsets(self) -> tuple[Tensor, Tensor | None]:
        """(ceil(n/blocksize),) float32 each, decoded: scales, and offsets where the format has them."""
        return scales_and_offsets(self.absmax, self.nested_absmax, self.nested_offset, self.quant_type)

    @property
    def scale(self) -> str:
        """The `quant.scale` that its scales show: mse-signed where one is negative, else absmax (or mse).

        Where they cannot show it, of bof4-s and int4-asym, mse-signed, the default.
        """
        scales, offsets = self.scales_and_offsets()
        return "mse-signed" if offsets is not None or (scales < 0).any() else "absmax"

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight, `shape`, in `dtype` (default: `self.dtype`)."""
        result: Tensor = torch.ops.halfbyte.dequantize_4bit(*self.op_args, list(self.shape), dtype or self.dtype)
        return result

    def row_slices(self, max_elements: int) -> Iterator[QuantizedWeight]:
        """The weight in pieces of whole rows, at most `max_elements` each where pairs of blocks allow it.

        Their scales are float32, under double quantization the decoded ones: each piece decodes to the same bits.
        """
        scales, each = self.absmax, constants_of(self.quant_type)
        if self.nested_absmax is not None:
            scales = expand_absmax(self.absmax, self.nested_absmax, self.nested_offset, each)
        rows, row = slice_rows(self.shape, self.blocksize, max_elements), prod(self.shape[1:])
        for start in range(0, self.shape[0], rows):
            count = min(rows, self.shape[0] - start)
            first, last = start * row, (start + count) * row
            yield replace(
                self, codes=self.codes[first * self.bits // 8 : num_code_bytes(last, self.bits)],
                nested_absmax=None, nested_offset=0.0,
                absmax=scales[each * (first // self.blocksize) : each * -(-last // self.blocksize)],
                shape=(count, *self.shape[1:]),
            )  # fmt: skip

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on `device`."""
        nested = None if self.nested_absmax is None else self.nested_absmax.to(device)
        return replace(self, codes=self.codes.to(device), absmax=self.absmax.to(device), nested_absmax=nested)

    # -- bitsandbytes' representation ---------------------------------------------------------------------------

    def bnb_tensors(self) -> dict[str, Tensor]:
        """What is stored beside the codes, by key suffix ("absmax", "quant_map", ...; docs/format.md).

        bitsandbytes' own keys for its codebooks; for others the quant_state has a name that it does not look for.
        """
        numbers: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        # The tables are copies: safetensors refuses tensors that share memory, transformers takes them for tied ones.
        tensors = {"absmax": self.absmax, "quant_map": codebook(self.quant_type, self.blocksize).values.clone()}
        if self.nested_absmax is not None:
            tensors["nested_absmax"] = self.nested_absmax
            tensors["nested_quant_map"] = dynamic_map().clone()
            numbers |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset,
            }
        text = json.dumps(numbers).encode()
        tensors[state_key(self.quant_type)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return tensors

    @classmethod
    def from_bnb_tensors(cls, codes: Tensor, tensors: dict[str, Tensor], *, name: str = "weight") -> QuantizedWeight:
        """Inverse of `bnb_tensors`; `codes` may be stored in any dtype of the same bytes.

        Raises:
            ModelError: keys are missing or unknown, or the tables are not the ones the codes are decoded by.
        """
        state_keys = [key for key in tensors if key in STATE_KEYS]
        if len(state_keys) != 1:
            raise ModelError("has no single quant_state", where=name, why=f"its keys are {sorted(tensors)}")
        numbers = _read_state(tensors[state_keys[0]], name)
        if state_keys[0] != state_key(numbers["quant_type"]):
            raise ModelError(f"its {state_keys[0]} says {numbers['quant_type']}", where=name)
        expected = {"absmax": None, "quant_map": codebook(numbers["quant_type"], numbers["blocksize"]).values}
        double_quant = numbers["nested_offset"] is not None
        if double_quant:
            expected |= {"nested_absmax": None, "nested_quant_map": dynamic_map()}
        if set(tensors) - {state_keys[0]} != set(expected):
            raise ModelError(f"has the keys {sorted(tensors)}", where=name, why=f"expected {sorted(expected)}")
        for key, values in expected.items():
            # bitsandbytes' kernels ignore the stored tables and go by quant_type: another table would decode wrongly.
            if values is not None and not _same_table(tensors[key], values):
                raise ModelError(f"its {key} is not the table of {numbers['quant_type']}", where=name)
        weight = cls(
            codes=codes.contiguous().view(torch.uint8).reshape(-1),
            absmax=tensors["absmax"].reshape(-1),
            nested_absmax=tensors["nested_absmax"].float().reshape(-1) if double_quant else None,
            **numbers | {"nested_offset": numbers["nested_offset"] or 0.0},
        )
        try:
            ops._check_weight(*weight.op_args[:3], *weight.op_args[4:], prod(weight.shape))
        except RuntimeError as error:
            raise ModelError("does not hold what its quant_state says", where=name, why=str(error)) from None
        scales = weight.absmax if weight.nested_absmax is None else weight.nested_absmax
        bad = int((~torch.isfinite(scales)).sum()) + (not math.isfinite(weight.nested_offset))
        if bad:
            raise ModelError(f"has {bad} NaN or Inf in its scales", where=name, fix="Use a checkpoint that is finite")
        return weight

    def to_bnb(self) -> tuple[Tensor, QuantState]:
        """bitsandbytes' pair: packed codes (ceil(n/2), 1) and a QuantState sharing this weight's tensors.

        Raises:
            ConfigError: bitsandbytes has no such codebook.
        """
        if self.quant_type not in BNB_TYPES:
            raise ConfigError(
                f"bitsandbytes has no {self.quant_type}", where="to_bnb", fix=f"Quantize to {' or '.join(BNB_TYPES)}"
            )
        from bitsandbytes.functional import QuantState

        tensors = {f"weight.{key}": value for key, value in self.bnb_tensors().items()}
        return self.codes.view(-1, 1), QuantState.from_dict(tensors, device=self.codes.device)

    @classmethod
    def from_bnb(cls, packed: Tensor, quant_state: QuantState) -> QuantizedWeight:
        """From bitsandbytes' packed codes and QuantState."""
        return cls.from_bnb_tensors(packed, dict(quant_state.as_dict(packed=True)))


def _read_state(packed: Tensor, name: str) -> dict[str, Any]:
    """bitsandbytes' JSON as the fields of QuantizedWeight, each checked; nested_offset is None without them."""
    try:
        numbers = json.loads(bytes(packed.cpu().tolist()))
        state = {
            "quant_type": str(numbers["quant_type"]),
            "blocksize": int(numbers["blocksize"]),
            "shape": tuple(map(int, numbers["shape"])),
            "dtype": getattr(torch, str(numbers["dtype"])),
            "nested_offset": float(numbers["nested_offset"]) if "nested_offset" in numbers else None,
        }
        if state["quant_type"] not in QUANT_TYPES:
            raise ValueError(f"unknown quant_type {state['quant_type']!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError("has an unreadable quant_state", where=name, why=str(error)) from None
    if state["nested_offset"] is not None and numbers.get("nested_blocksize") != NESTED_BLOCKSIZE:
        raise ModelError(f"has a nested blocksize other than {NESTED_BLOCKSIZE}", where=name)
    for key, good in (
        ("blocksize", state["blocksize"] in BLOCKSIZES),
        ("dtype", state["dtype"] in SOURCE_DTYPES),
        ("shape", all(size >= 0 for size in state["shape"])),
    ):
        if not good:
            raise ModelError(f"its quant_state has the {key} {numbers[key]}", where=name, why="it is not possible")
    return state


def _same_table(stored: Tensor, values: Tensor) -> bool:
    stored = stored.cpu().float().reshape(-1)
    return stored.shape == values.shape and torch.allclose(stored, values, rtol=0, atol=1e-6)
