"""bitsandbytes' CUDA kernels behind our operators: they decode our bytes, since the format is theirs.

They serve a row or two, and what Triton's do not know or where it is not installed. Not for quantizing: they give an
all-zero block code 0 where the format (docs/format.md) says the code of 0, and divide by an approximate reciprocal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.config.formats import BNB_TYPES
from halfbyte.kernels.device_tables import device_tables
from halfbyte.kernels.panel import Weight
from halfbyte.quant.blocks import NESTED_BLOCKSIZE

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MOST_ELEMENTS = 2**31 - 1
"""Its kernels count in int32."""


def find() -> str | None:
    """None when bitsandbytes' CUDA kernels can serve here, else why not."""
    try:
        import bitsandbytes
        from bitsandbytes.cextension import lib
    except Exception as error:  # its import runs much: a broken installation must not take the GPU with it
        return f"it cannot be imported: {error}"
    if not lib.compiled_with_cuda:
        return f"bitsandbytes {bitsandbytes.__version__} has no library for this CUDA"
    for op in ("dequantize_4bit", "dequantize_blockwise", "gemm_4bit"):
        if not hasattr(torch.ops.bitsandbytes, op):
            return f"bitsandbytes {bitsandbytes.__version__} has no {op}; 0.50 has"
    return None


def knows(quant_type: str, blocksize: int, dtype: torch.dtype, count: int) -> bool:
    """Is a weight of `count` elements, decoded to `dtype`, its case?"""
    floating = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return quant_type in BNB_TYPES and floating and blocksize in BLOCKSIZES and 0 < count <= MOST_ELEMENTS


def dequantize(weight: Weight, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The decoded weight, in `out` if given; under double quantization its float32 scales are made first."""
    codes, absmax, nested_absmax, nested_offset, quant_type, blocksize = weight
    if nested_absmax is not None:
        _, dynamic = device_tables(quant_type, blocksize, codes.device)
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax.contiguous(), nested_absmax.contiguous(), dynamic, NESTED_BLOCKSIZE, torch.float32
        )
        # The kernel multiplies, torch adds: two roundings, as the reference has them.
        absmax = scales.add_(nested_offset)
    case = (codes.contiguous(), absmax.contiguous(), blocksize, quant_type, list(shape), dtype)
    if out is None:
        result: Tensor = torch.ops.bitsandbytes.dequantize_4bit(*case)
        return result
    torch.ops.bitsandbytes.dequantize_4bit.out(*case, out=out)
    return out


def linear(x: Tensor, weight: Weight, bias: Tensor | None, out_features: int) -> Tensor:
    """x (m, in_features) @ W^T + bias. Its kernel or decode-and-multiply, by its own table of GPUs and shapes."""
    codes, absmax, nested_absmax, nested_offset, quant_type, blocksize = weight
    shape = [out_features, x.shape[1]]
    if x.shape[1] % blocksize or not x.numel():  # it would warn, and decode and multiply as here
        return torch.nn.functional.linear(x, dequantize(weight, (out_features, x.shape[1]), x.dtype), bias)
    scales: tuple[Tensor | None, ...] = (absmax.contiguous(), None, None, None)
    if nested_absmax is not None:
        _, dynamic = device_tables(quant_type, blocksize, codes.device)
        offset = torch.full((), nested_offset, dtype=torch.float32, device=codes.device)
        scales = (nested_absmax.contiguous(), absmax.contiguous(), dynamic, offset)
    result: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        x, codes.contiguous(), shape, scales[0], blocksize, quant_type, bias, *scales[1:]
    )
    return result


def linear_dx(grad: Tensor, weight: Weight, in_features: int) -> Tensor:
    """grad (m, out_features) @ W: it has no kernel for this, so decode and multiply."""
    return grad @ dequantize(weight, (grad.shape[1], in_features), grad.dtype)
