"""What comes back is what was saved, and no more stays in memory or in the file than was promised."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from halfbyte.errors import ResourceError
from halfbyte.store import ActivationStore
from halfbyte.store.direct_io import DirectFile

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
        ends.append(store._end)
    assert ends[0] == ends[1]
    assert store.bytes_written == 2 * 2 * DEPTH * x.nbytes  # the input of every layer and of every activation
    assert 0 < store.bytes_read <= store.bytes_written
    assert list(tmp_path.iterdir()) == []
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
    assert store._end == 2 * DEPTH * x.nbytes
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
