"""The native CPU library: loading it, and one Python function for each of its functions.

ctypes, because the library knows nothing of Python: one wheel a platform for every Python version, and the GIL is
released during each call. The library takes plain pointers, so every function here makes its tensors contiguous.
"""

from __future__ import annotations

import ctypes as ct
import importlib.util
from math import prod
from typing import Any

import torch
from torch import Tensor

from halfbyte.config.formats import bits_of, constants_of
from halfbyte.kernels.abi import ABI_VERSION, DTYPES, ISAS, OK, SIGNATURES, Weight
from halfbyte.quant.blocks import NESTED_BLOCKSIZE, num_blocks, num_code_bytes, num_constants
from halfbyte.quant.codebook import codebook, dynamic_map
from halfbyte.quant.memory import HUGE_PAGE, lasting

MODULE = "halfbyte.kernels._halfbyte_cpu"
LEAST_BLOCKSIZE = 32
"""The library handles block sizes that are powers of two from this on."""


class Library:
    """The loaded library. Raises OSError, AttributeError or ValueError when it cannot serve."""

    def __init__(self, path: str) -> None:
        handle = ct.CDLL(path)
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
        self.path = path
        self.call: Any = handle
        if (found := handle.hb_abi_version()) != ABI_VERSION:
            raise ValueError(f"ABI {found} where {ABI_VERSION} is needed: it was built from other sources")

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return ISAS[self.call.hb_isa_current()]

    @property
    def fused_linear(self) -> bool:
        """Does the instruction set in use have the fused matrix products?"""
        return bool(self.call.hb_has_fused_linear())

    def attends(self, head_dim: int) -> bool:
        """Does the instruction set in use have attention over heads of this size?"""
        return bool(self.call.hb_has_attention(head_dim))

    @property
    def fast_bf16(self) -> bool:
        """Does this CPU multiply bfloat16 natively, about twice as fast as float32?"""
        return bool(self.call.hb_fast_bf16())

    @property
    def openmp(self) -> bool:
        return bool(self.call.hb_openmp())

    def supported(self) -> tuple[str, ...]:
        """Instruction sets that this build has and this CPU runs."""
        return tuple(isa for number, isa in enumerate(ISAS) if self.call.hb_isa_supported(number))

    def force(self, isa: str) -> bool:
        """Use `isa` from now on; False when it is not among `supported`."""
        return isa in ISAS and self.call.hb_isa_force(ISAS.index(isa)) == OK

    def release_workspace(self) -> None:
        """Give the buffers that the matrix products keep back to the system."""
        self.call.hb_release_workspace()

    def quantize(self, weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
        """`quant.reference.quantize_reference`, bit for bit."""
        table, flat = codebook(quant_type, blocksize), weight.detach().contiguous()
        count, codes = flat.numel(), _empty_codes(flat.numel())
        absmax = torch.empty(num_blocks(count, blocksize), dtype=torch.float32)
        status = self.call.hb_quantize(
            flat.data_ptr(), DTYPES[flat.dtype], count, blocksize, table.unit_boundaries.data_ptr(),
            table.order.data_ptr(), codes.data_ptr(), absmax.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if status != OK:
            raise RuntimeError(f"hb_quantize: status {status}")
        return codes, table.scales(absmax)

    def codes_for_scales(self, weight: Tensor, scales: Tensor, quant_type: str, blocksize: int) -> Tensor:
        """`quant.scales.codes_for_scales_reference`, bit for bit."""
        table, flat = codebook(quant_type, blocksize), weight.detach().contiguous()
        scales, codes = scales.contiguous(), _empty_codes(flat.numel())
        if scales.dtype != torch.float32 or scales.numel() != num_constants(flat.numel(), blocksize, quant_type):
            raise ValueError(
                f"{scales.numel()} {scales.dtype} scales for {num_blocks(flat.numel(), blocksize)} blocks"
            )
        status = self.call.hb_codes_for_scales(
            flat.data_ptr(), DTYPES[flat.dtype], flat.numel(), blocksize, scales.data_ptr(), constants_of(quant_type),
            table.boundaries.data_ptr(), table.order.data_ptr(), codes.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if status != OK:
            raise RuntimeError(f"hb_codes_for_scales: status {status}")
        return codes

    def count_nonfinite(self, tensor: Tensor) -> int:
        """NaN and Inf in a float32, bfloat16 or float16 CPU tensor."""
        flat = tensor.detach().contiguous()
        count = self.call.hb_count_nonfinite(
            flat.data_ptr(), DTYPES[flat.dtype], flat.numel(), torch.get_num_threads()
        )
        return int(count)


def _empty_codes(count: int) -> Tensor:
    """For so many codes of 4 bits."""
    nbytes = num_code_bytes(count)
    return lasting(nbytes) if nbytes >= HUGE_PAGE else torch.empty(nbytes, dtype=torch.uint8)


class WeightView:
    """A quantized weight as the library sees it. Keeps alive the tensors it points into."""

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_offset: float,
        quant_type: str,
        blocksize: int,
        shape: tuple[int, int],
    ) -> None:
        values, dynamic = codebook(quant_type, blocksize).sixteen, dynamic_map()
        codes, absmax = codes.contiguous(), absmax.contiguous()
        count = prod(shape)
        scale_dtype = torch.float32 if nested_absmax is None else torch.uint8
        # The library would read past the end: these are checks, not assertions.
        if codes.dtype != torch.uint8 or codes.numel() != num_code_bytes(count, bits_of(quant_type)):
            raise ValueError(f"{codes.numel()} {codes.dtype} codes for a weight of {count}")
        if absmax.dtype != scale_dtype or absmax.numel() != num_constants(count, blocksize, quant_type):
            raise ValueError(f"{absmax.numel()} {absmax.dtype} scales for {num_blocks(count, blocksize)} blocks")
        nested = None
        if nested_absmax is not None:
            nested = nested_absmax.contiguous()
            if nested.dtype != torch.float32 or nested.numel() != num_blocks(absmax.numel(), NESTED_BLOCKSIZE):
                raise ValueError(f"{nested.numel()} {nested.dtype} second-level scales for {absmax.numel()} blocks")
        self._kept = (codes, absmax, nested, values, dynamic)
        self.struct = Weight(
            codes.data_ptr(), absmax.data_ptr(), None if nested is None else nested.data_ptr(), dynamic.data_ptr(),
            values.data_ptr(), blocksize, NESTED_BLOCKSIZE, shape[0], shape[1], nested_offset,
            constants_of(quant_type), bits_of(quant_type),
        )  # fmt: skip
        self.pointer = ct.addressof(self.struct)
        self.count = count

    def dequantize_into(self, library: Library, out: Tensor, first: int = 0) -> None:
        """Elements `first` and on of the flat weight into all of `out`; `first` is a multiple of the block size."""
        assert out.is_contiguous()
        assert first + out.numel() <= self.count
        status = library.call.hb_dequantize(
            self.pointer, first, out.numel(), DTYPES[out.dtype], out.data_ptr(), torch.get_num_threads()
        )
        if status != OK:
            raise RuntimeError(f"hb_dequantize: status {status}")


def find_library() -> str | None:
    """The library's path; None where it was not built. Python's own search also serves editable installs."""
    spec = importlib.util.find_spec(MODULE)
    return spec.origin if spec is not None else None
