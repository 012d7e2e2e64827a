"""What a store lends is what the file holds, in any order, whatever it guessed; and it reads no more than it said."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from fake_device import POISON, FakeDevice, LateDevice

from halfbyte.errors import HalfbyteError
from halfbyte.store import ALIGNMENT, Extent, LayerStore, RowStore, memory_of
from halfbyte.store.layers import GAP, READERS, spread
from halfbyte.store.tiers import STAGING_BYTES

SIZES = (5000, 17, 70_000, 1, 4096)


@pytest.fixture
def files(tmp_path: Path) -> tuple[list[Path], list[list[Extent]]]:
    """Nine layers of five tensors, of no size or place in particular, in two files of random bytes."""
    generator = torch.Generator().manual_seed(0)
    paths, layers = [tmp_path / "a", tmp_path / "b"], []
    places = dict.fromkeys(paths, 1234)
    for layer in range(9):
        extents = []
        for number, size in enumerate(SIZES):
            path = paths[(layer + (number == 2)) % 2]  # the large one in the other file
            extents.append(Extent(path, places[path], places[path] + size + layer))
            places[path] += size + layer + (2 * GAP if number == 3 else 0)
        layers.append(extents)
    for path in paths:
        path.write_bytes(torch.randint(0, 256, (places[path],), dtype=torch.uint8, generator=generator).numpy().data)
    return paths, layers


def expected(extents: list[Extent]) -> list[bytes]:
    return [extent.file.read_bytes()[extent.start : extent.end] for extent in extents]


@pytest.mark.parametrize("ring", [2, 3, 20])
def test_every_layer_is_what_the_file_holds(files: tuple[list[Path], list[list[Extent]]], ring: int) -> None:
    _, layers = files
    store = LayerStore(layers, ring)
    up, down = list(range(9)), list(range(8, -1, -1))
    unexpected = [3, 3, 0, 8, 5]
    passes = [*((n, False) for n in up), *((n, True) for n in down), *((n, False) for n in unexpected)]
    for layer, backward in passes:
        with store.use(layer, backward=backward, turns=True) as tensors:
            assert [t.numpy().tobytes() for t in tensors] == expected(layers[layer])
    assert store.traffic.uses == len(passes)
    assert store.nbytes <= min(ring, 9) * max(store.stored_bytes / 8, 1)
    store.close()


def test_a_step_reads_what_the_ring_cannot_keep(files: tuple[list[Path], list[list[Extent]]]) -> None:
    """Up and down again through 9 layers with 3 buffers: 9 reads, then 6, then 6 for the next way up."""
    _, layers = files
    store = LayerStore(layers, 3)
    order = [*((n, False) for n in range(9)), *((n, True) for n in range(8, -1, -1))]
    reads = []
    for _ in range(3):
        before = store.traffic.bytes_read
        for layer, backward in order:
            with store.use(layer, backward=backward, turns=True):
                pass
        reads.append((store.traffic.bytes_read - before) / store.stored_bytes)
    assert store.traffic.waits == 1  # the very first; all others were under way
    assert reads[1] == reads[2] == pytest.approx(12 / 9, abs=0.05)
    store.close()


def test_a_smaller_ring_gives_the_same_bytes(files: tuple[list[Path], list[list[Extent]]]) -> None:
    _, layers = files
    store = LayerStore(layers, 4)
    whole = store.nbytes
    with store.use(0), store.use(5):
        pass
    assert [store.shrink() for _ in range(4)] == [whole // 4, whole // 4, 0, 0]
    assert store.nbytes == whole // 2
    for layer in (*range(9), *range(8, -1, -1)):
        with store.use(layer, turns=True) as tensors:
            assert [t.numpy().tobytes() for t in tensors] == expected(layers[layer])
    store.close()


def test_nested_uses_hold_different_buffers(files: tuple[list[Path], list[list[Extent]]]) -> None:
    _, layers = files
    store = LayerStore(layers, 2)
    with store.use(0) as first, store.use(5) as second:
        assert [t.numpy().tobytes() for t in first] == expected(layers[0])
        assert [t.numpy().tobytes() for t in second] == expected(layers[5])
        with pytest.raises(RuntimeError, match="in use"), store.use(7):
            pass
    store.close()


def test_a_file_that_got_shorter_is_an_error_at_every_use(files: tuple[list[Path], list[list[Extent]]]) -> None:
    paths, layers = files
    store = LayerStore(layers, 2)
    for path in paths:
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(HalfbyteError, match="cut off"), store.use(4):
            pass
    store.close()


UP_AND_DOWN = [*((layer, False) for layer in range(9)), *((layer, True) for layer in range(8, -1, -1))]


def steps(store: LayerStore, device: LateDevice, count: int) -> list[tuple[int, list[bytes]]]:
    """What the device's work, which comes late, finds in each layer that it is lent."""
    found: list[tuple[int, Future[object]]] = []
    for layer, backward in UP_AND_DOWN * count:
        with store.use(layer, backward=backward, turns=True) as tensors:
            found.append((layer, device.launch(lambda lent=tensors: [t.numpy().tobytes() for t in lent])))
    return [(layer, work.result()) for layer, work in found]  # type: ignore[misc]


@pytest.mark.parametrize("copies", [0, 4, 9])
@pytest.mark.parametrize("ring", [2, 3])
def test_a_device_gets_every_layer(files: tuple[list[Path], list[list[Extent]]], copies: int, ring: int) -> None:
    """However late work and copies are: bytes to the device, its fullest moment, host memory and the disk are what the
    store says. Without copies in host memory, with some, with all; those come from the disk once.
    """
    paths, layers = files
    for path in paths:
        path.write_bytes(path.read_bytes() + bytes(ALIGNMENT))  # so that every layer is whole blocks of the disk
    device = LateDevice(copy_seconds=0.001, work_seconds=0.002)
    largest = max(LayerStore([layer]).stored_bytes for layer in layers)
    store = LayerStore(layers, ring, device, host_budget=copies * largest + 1)
    assert all(lent == expected(layers[layer]) for layer, lent in steps(store, device, 3))
    store._readers.shutdown()  # what was read ahead for a fourth step
    assert device.peak == device.held == store.nbytes == ring * largest
    assert device.to_device == store.traffic.bytes_read + store.traffic.bytes_from_host
    assert (copies - 1) * largest < store.host_bytes <= copies * largest if copies else store.host_bytes == 0
    assert device.to_host == store.host_bytes, "a layer is copied once"
    assert device.host <= store.host_bytes + READERS * STAGING_BYTES
    read_once = sum(LayerStore([layers[layer]]).stored_bytes for layer in spread(copies, 9))
    again = store.stored_bytes - read_once
    assert read_once + (again * 3 if again else 0) <= store.traffic.bytes_read <= read_once + again * 6
    del store
    device.finish()
    assert device.held == 0


@pytest.mark.parametrize("fault", ["a buffer is filled while work reads it", "work begins before the copy is done"])
def test_the_fake_device_sees(files: tuple[list[Path], list[list[Extent]]], fault: str) -> None:
    """The checks above can fail."""
    _, layers = files
    timers = list[threading.Timer]()

    class Faulty(LateDevice):
        def mark(self) -> Callable[[], object]:
            return (lambda: None) if fault.startswith("a buffer") else super().mark()

        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
            if fault.startswith("a buffer"):
                return super().copy(target, source)
            target.fill_(POISON)
            timer = threading.Timer(0.05, target.copy_, (source.clone(),))
            timer.start()
            timers.append(timer)

    device = Faulty(copy_seconds=0.005, work_seconds=0.01)
    store = LayerStore(layers, 2, device)
    assert not all(lent == expected(layers[layer]) for layer, lent in steps(store, device, 1))
    for timer in timers:
        timer.join()


def test_a_copy_in_host_memory_is_used_when_the_file_is_gone(files: tuple[list[Path], list[list[Extent]]]) -> None:
    """Not read again; on a machine without a device there are no copies."""
    paths, layers = files
    store = LayerStore(layers, 2, FakeDevice(), host_budget=10**9)
    wanted = [expected(extents) for extents in layers]
    steps_taken = [(layer, turns) for turns in range(2) for layer in range(9)]
    for layer, turn in steps_taken:
        if turn:
            for path in paths:
                path.write_bytes(b"")
        with store.use(layer) as tensors:
            assert [t.numpy().tobytes() for t in tensors] == wanted[layer]
    assert LayerStore(layers, 2, host_budget=10**9).host_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("host_budget", [0, 300_000, 10**9])
def test_on_a_gpu(files: tuple[list[Path], list[list[Extent]]], host_budget: int) -> None:
    """The work on a layer is queued behind work that takes the GPU a while; bytes are compared at the end."""
    _, layers = files
    store = LayerStore(layers, 2, memory_of(torch.device("cuda")), host_budget)
    busy = torch.randn(2048, 2048, device="cuda")
    kept = []
    for layer, backward in UP_AND_DOWN * 3:
        with store.use(layer, backward=backward, turns=True) as tensors:
            for _ in range(20):
                busy = (busy @ busy).tanh()
            kept.append((layer, [t + (busy[0, 0] > 2).to(torch.uint8) for t in tensors]))
    for layer, found in kept:
        assert [t.cpu().numpy().tobytes() for t in found] == expected(layers[layer])
    assert store.host_bytes <= host_budget


def test_a_ring_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="ring of 1"):
        LayerStore([], 1)


def test_rows_are_those_of_the_table(tmp_path: Path) -> None:
    """Rows of 96 bytes from an odd place on, so that one in some lies across two blocks of the disk."""
    table = torch.arange(500 * 96).to(torch.uint8).view(500, 96)
    path = tmp_path / "table"
    path.write_bytes(bytes(1001) + table.numpy().tobytes() + bytes(7))
    rows = RowStore(Extent(path, 1001, 1001 + table.nbytes), 96)
    wanted = [499, 0, 42, 42, *range(60)]
    assert torch.equal(rows.read(wanted), table[wanted])
    for missing in (-1, 500):
        with pytest.raises(IndexError, match="table of 500"):
            rows.read([missing])
