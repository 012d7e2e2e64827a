"""Codes in bytes, one after the other, the first in the HIGH bits (as bitsandbytes; GGUF, GPTQ and AWQ differ)."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from halfbyte.quant.blocks import num_code_bytes


def pack_nibbles(codes: Tensor, pad_code: int) -> Tensor:
    """(n,) uint8 codes below 16 -> (ceil(n/2),) uint8; an odd last low nibble is `pad_code`."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), pad_code)])
    return (codes[::2] << 4) | codes[1::2]


def unpack_nibbles(packed: Tensor, num_codes: int) -> Tensor:
    """Inverse of `pack_nibbles`: (ceil(num_codes/2),) uint8 -> (num_codes,) uint8."""
    return torch.stack([packed >> 4, packed & 0xF], dim=-1).reshape(-1)[:num_codes]


def pack_codes(codes: Tensor, bits: int, pad_code: int) -> Tensor:
    """(n,) uint8 codes below 2**bits -> (num_code_bytes(n, bits),) uint8; what is left over holds `pad_code`."""
    if bits == 8:
        return codes
    if bits == 4:
        return pack_nibbles(codes, pad_code)
    each, size = _period(bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % each), value=pad_code).view(-1, each).int()
    word = (padded << _shifts(bits, each).to(codes.device)).sum(1, keepdim=True)
    packed: Tensor = (word >> _shifts(8, size).to(codes.device)).to(torch.uint8).view(-1)  # cut to its lowest byte
    return packed[: num_code_bytes(codes.numel(), bits)]


def unpack_codes(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Inverse of `pack_codes`: (num_codes,) uint8."""
    if bits == 8:
        return packed[:num_codes]
    if bits == 4:
        return unpack_nibbles(packed, num_codes)
    each, size = _period(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.numel() % size)).view(-1, size).int()
    word = (padded << _shifts(8, size).to(packed.device)).sum(1, keepdim=True)
    codes: Tensor = (word >> _shifts(bits, each).to(packed.device)) & (2**bits - 1)
    return codes.to(torch.uint8).view(-1)[:num_codes]


def _period(bits: int) -> tuple[int, int]:
    """So many codes fill so many bytes: 8 of 3 bits 3."""
    return 8 // gcd(bits, 8), bits // gcd(bits, 8)


def _shifts(bits: int, count: int) -> Tensor:
    return torch.arange(count - 1, -1, -1, dtype=torch.int32) * bits
