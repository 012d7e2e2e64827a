"""Two 4-bit codes to a byte, the first one in the HIGH nibble (as bitsandbytes; GGUF, GPTQ and AWQ differ)."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor, pad_code: int) -> Tensor:
    """(n,) uint8 codes below 16 -> (ceil(n/2),) uint8; an odd last low nibble is `pad_code`."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), pad_code)])
    return (codes[::2] << 4) | codes[1::2]


def unpack_nibbles(packed: Tensor, num_codes: int) -> Tensor:
    """Inverse of `pack_nibbles`: (ceil(num_codes/2),) uint8 -> (num_codes,) uint8."""
    return torch.stack([packed >> 4, packed & 0xF], dim=-1).reshape(-1)[:num_codes]
