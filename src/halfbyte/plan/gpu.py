"""The GPU as a plan sees it: looked for without torch; and what differs there from a CPU."""

from __future__ import annotations

import ctypes as ct
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CONTEXT = 860_000_000
"""Bytes of a GPU that CUDA's context, kernels and libraries take beside every tensor, where nothing was measured: on
an H100 550 MB when a run begins, and what it grows by (train/gpu.py)."""
CHUNK_BYTES = 256 * 2**20
"""Of float32 logits at a time on a GPU: fewer rows would leave most of it idle (nn/cross_entropy.py)."""
WORKSPACE = 64 * 2**20
"""Of cuBLAS, from torch's allocator: 32 MiB for each of its two interfaces on Hopper, less on others."""
ALLOCATOR_SHARE, ALLOCATOR_LEAST = 12, 64 * 2**20
"""Of the tensors, one in so many bytes, and what is added: what torch's allocator takes and cannot use. Measured on an
H100: 574 MB beside 8.8 GB of tensors, 167 MB beside 1.2 GB."""
FEW_ROWS = 2
"""Up to so many rows are multiplied with the 4-bit bytes themselves (kernels/cuda_lora.py)."""
MULTIPROCESSORS = 132
"""Of an H100: FlashAttention's backward sums dq in as many parts as keep them busy."""
_CAPABILITY_MAJOR = 75


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device: bytes of its memory that may be used, and the first part of its compute capability."""

    name: str
    memory: int
    capability: int

    @property
    def compute_dtype(self) -> str:
        """What quant.compute_dtype = "auto" becomes (model/compute_dtype.py)."""
        return "bfloat16" if self.capability >= 8 else "float32"


def find_gpu() -> Gpu | None:
    """The first CUDA device, by the driver's word; None where there is none, or torch was built without CUDA."""
    if not _torch_has_cuda():
        return None
    with suppress(OSError, AttributeError):
        driver = ct.CDLL("libcuda.so.1")
        device, size, major = ct.c_int(), ct.c_size_t(), ct.c_int()
        name = ct.create_string_buffer(256)
        calls = (
            driver.cuInit(0), driver.cuDeviceGet(ct.byref(device), 0), driver.cuDeviceGetName(name, 256, device),
            driver.cuDeviceTotalMem_v2(ct.byref(size), device),
            driver.cuDeviceGetAttribute(ct.byref(major), _CAPABILITY_MAJOR, device),
        )  # fmt: skip
        if not any(calls):
            return Gpu(name=name.value.decode(errors="replace"), memory=size.value, capability=major.value)
    return None


def _torch_has_cuda() -> bool:
    found = find_spec("torch")
    folders = (found.submodule_search_locations if found else None) or []
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders)
