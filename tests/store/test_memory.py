"""A GPU's memory, as far as it goes without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from halfbyte.store import ALIGNMENT
from halfbyte.store.memory import CudaMemory


def test_pinned_memory_is_what_was_asked_for_and_unpinned_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not rounded to a power of two, as torch's own; and the driver never holds pages that are not there."""
    calls: list[tuple[str, int]] = []
    driver = SimpleNamespace(
        cudaHostRegister=lambda address, nbytes, flags: calls.append((f"pin {nbytes} {flags}", address)) or 0,
        cudaHostUnregister=lambda address: calls.append(("unpin", address)),
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    memory = CudaMemory(torch.device("cuda"))
    whole = memory.allocate_host(5 * ALIGNMENT - 7)
    address = whole.data_ptr()
    assert (whole.nbytes, address % ALIGNMENT, int(whole.sum())) == (5 * ALIGNMENT - 7, 0, 0)
    part = whole[:9]
    del whole
    assert calls == [(f"pin {5 * ALIGNMENT} 0", address)], "a part of it is still in use"
    del part
    assert calls[1:] == [("unpin", address)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_on_a_gpu() -> None:
    memory = CudaMemory(torch.device("cuda"))
    there, here, back = memory.allocate_host(5000), memory.allocate(5000), memory.allocate_host(5000)
    assert there.is_pinned()
    there.copy_(torch.arange(5000).to(torch.uint8))
    memory.mark()()
    memory.copy(here, there)
    memory.copy(back, here)
    assert torch.equal(back, there)
