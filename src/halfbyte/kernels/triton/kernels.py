"""What the Triton kernels offer `kernels.cuda_ops`, and the cases they know."""

import torch

from halfbyte.config.formats import bits_of
from halfbyte.kernels.triton.codec import dequantize, quantize
from halfbyte.kernels.triton.decode import LEAST_BLOCKSIZE
from halfbyte.kernels.triton.linear import linear, linear_dx

__all__ = ["dequantize", "knows", "linear", "linear_dx", "quantize"]


def knows(quant_type: str, blocksize: int, dtype: torch.dtype) -> bool:
    """Is a weight in blocks of `blocksize`, decoded to (or quantized from) `dtype`, a case for these kernels?"""
    power_of_two = blocksize >= LEAST_BLOCKSIZE and blocksize & (blocksize - 1) == 0
    return bits_of(quant_type) == 4 and power_of_two and dtype in (torch.float32, torch.bfloat16, torch.float16)
