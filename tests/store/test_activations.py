"""What comes back is what was saved, and no more stays in memory or in the file than was promised."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_device import POISON, FakeDevice, LateDevice
from torch import nn

from halfbyte.errors import ResourceError
from halfbyte.store import ActivationStore
from halfbyte.store.activations import AHEAD, LEAST
from halfbyte.store.direct_io import DirectFile
from halfbyte.store.tiers import STAGING_BYTES

WIDTH, DEPTH = 256, 12


@pytest.fixture
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(DEPTH)))


def gradients(layers: nn.Sequential, x: torch.Tensor, store: ActivationStore | None) -> list[torch.Tensor]:
    layers.zero_grad()
    if store is None:
        y = layers(x)
    else:
        with store.hooks():
            y = layers(x)
    y.square().sum().backward()
    return [p.grad.clone() for p in layers.parameters() if p.grad is not None]


def test_gradients_are_those_of_tensors_that_stayed(layers: nn.Sequential, tmp_path: Path) -> None:
    """Twice, so that places in the file are used again; of an odd number of rows, so that none is whole blocks."""
    store = ActivationStore(tmp_path)
    x = torch.randn(77, WIDTH)
    kept = gradients(layers, x, None)
    ends = []
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(gradients(layers, x, store), kept, strict=True))
        ends.append(store._tiers[-1].nbytes)
    assert ends[0] == ends[1]
    assert store.bytes_written == 2 * 2 * DEPTH * x.nbytes  # the input of every layer and of every activation
    assert 0 < store.bytes_read <= store.bytes_written
    assert list(tmp_path.iterdir()) == []
    store.close()


@pytest.mark.parametrize("host_tensors", [0, 5, 100])
def test_behind_a_device(layers: nn.Sequential, tmp_path: Path, host_tensors: int) -> None:
    """All on disk, five tensors in host memory and the rest on disk, all in host memory; copies come late."""
    device = FakeDevice(copy_seconds=0.001)
    x = torch.randn(64, WIDTH)
    store = ActivationStore(tmp_path, device, host_budget=host_tensors * x.nbytes + 1)
    kept = gradients(layers, x, None)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(gradients(layers, x, store), kept, strict=True))
    in_host = min(host_tensors, 2 * DEPTH) * x.nbytes
    assert [tier.nbytes for tier in store._tiers] == [in_host, 2 * DEPTH * x.nbytes - in_host]
    assert device.to_device == store.bytes_read
    assert store.bytes_read <= device.to_host <= store.bytes_written  # a write that nobody needs any more is left out
    assert store.bytes_written == 2 * 2 * DEPTH * x.nbytes
    assert device.peak <= (AHEAD + 2) * x.nbytes  # those read ahead, the one in use, the one before it
    assert device.host_peak <= in_host + 2 * STAGING_BYTES
    store.close()
    assert device.host <= 2 * STAGING_BYTES


@pytest.mark.parametrize("host_tensors", [0, 5])
def test_a_device_that_works_late_is_waited_for(tmp_path: Path, host_tensors: int) -> None:
    """What a forward pass makes is written when the device has made it; what comes back is there before it is used."""
    device = LateDevice(copy_seconds=0.001, work_seconds=0.002)
    store = ActivationStore(tmp_path, device, host_budget=host_tensors * 8 * LEAST)
    made = [torch.full((8 * LEAST,), POISON, dtype=torch.uint8) for _ in range(20)]
    tickets, found = [], []
    for number, tensor in enumerate(made):
        device.launch(partial(tensor.fill_, number))
        tickets.append(store._pack(tensor))
    del made, tensor
    while tickets:
        back = store._unpack(tickets.pop())
        found.append(device.launch(partial(back.unique)))
    assert [work.result().tolist() for work in found] == [[number] for number in range(19, -1, -1)]
    store.close()


def test_a_graph_without_a_backward_gives_its_places_back(layers: nn.Sequential, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path)
    x = torch.randn(64, WIDTH)
    for _ in range(3):
        with store.hooks():
            y = layers(x)
        del y
        gc.collect()
        assert store._entries == []
    assert store._tiers[-1].nbytes == 2 * DEPTH * x.nbytes
    store.close()


def test_a_full_disk_is_an_error_at_the_forward_pass(
    layers: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ActivationStore(tmp_path)

    def full(self: DirectFile, nbytes: int) -> None:
        raise ResourceError("no room is left", where=str(tmp_path))

    monkeypatch.setattr(DirectFile, "grow", full)
    with pytest.raises(ResourceError, match="no room"), store.hooks():
        layers(torch.randn(64, WIDTH))
    store.close()
