"""The pool gives every page back as it was left, within its budget, with the transfers that the scheme predicts."""

from __future__ import annotations

import gc
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_device import FakeDevice, LateDevice
from torch import Tensor

from halfbyte.errors import ResourceError
from halfbyte.store import ALIGNMENT, DiskTier, HostTier, Memory, PagePool

PAGE = ALIGNMENT


class Counted(DiskTier):
    """Counts pages read and written."""

    reads = writes = 0

    def read(self, start: int, target: Tensor) -> None:
        self.reads += 1
        super().read(start, target)

    def write(self, start: int, source: Tensor) -> None:
        self.writes += 1
        super().write(start, source)


def make(slots: int, folder: Path, memory: Memory | None = None, host_pages: int = 0) -> tuple[PagePool, Counted]:
    memory = memory or Memory()
    disk = Counted(memory, folder, PAGE)
    tiers = [HostTier(memory, host_pages * PAGE), disk] if host_pages else [disk]
    return PagePool(PAGE, slots * PAGE, memory, tiers), disk


@pytest.mark.parametrize("slots", [2, 3, 4, 7, 20, 60])
@pytest.mark.parametrize("host_pages", [0, 5])
def test_every_page_comes_back_as_it_was_left(slots: int, host_pages: int, tmp_path: Path) -> None:
    """Sweeps of all kinds over a growing pool beside a list of numbers: in order, some only, at random, broken off."""
    draw = random.Random(slots)
    memory = FakeDevice() if host_pages else Memory()
    pool, _ = make(slots, tmp_path, memory, host_pages)
    expected: list[int] = []
    for turn in range(60):
        if turn % 15 == 0:
            count = draw.choice([1, 7, 20])
            assert list(pool.extend(count)) == list(range(len(expected), len(expected) + count))
            expected += [0] * count
        order = list(range(len(expected)))
        kind = draw.choice(["all", "some", "random", "broken", "only read"])
        if kind == "some":
            order = [page for page in order if draw.random() < 0.4]
        if kind == "random":
            draw.shuffle(order)
        stop = draw.randrange(len(order) + 1) if kind == "broken" else len(order)
        for number, (page, memory_of_page) in enumerate(pool.sweep(order, write=kind != "only read")):
            assert page == order[number]
            words = memory_of_page.view(torch.int32)
            assert words.unique().tolist() == [expected[page]], (turn, kind, page)
            if kind != "only read":
                expected[page] = draw.randrange(1 << 30)
                words.fill_(expected[page])
            if number + 1 == stop:
                break
        assert pool.resident_bytes <= slots * PAGE
    assert pool.resident_bytes == min(slots, pool.pages) * PAGE
    if isinstance(memory, FakeDevice):
        assert memory.held == memory.peak == pool.resident_bytes
        assert memory.host_peak <= (host_pages + 2) * PAGE, "the host tier, and a page on the way for each worker"


@pytest.mark.parametrize(("slots", "ring"), [(2, 2), (3, 2), (9, 3), (30, 8), (40, 8)])
def test_transfers_are_those_predicted(slots: int, ring: int, tmp_path: Path) -> None:
    """In each sweep after the first, what is not kept for good is read once and written once; 40 pages, no more."""
    pool, disk = make(slots, tmp_path)
    pool.extend(40)
    passing = 0 if slots == 40 else 40 - (slots - ring)
    for sweep in range(4):
        for _, page in pool.sweep(range(40)):
            page.add_(1)
        for slot in pool._slots:
            if slot.arriving:
                slot.arriving.result()
        assert disk.writes == disk.reads == (sweep + 1) * passing
    assert [int(page[0]) for _, page in pool.sweep(range(40), write=False)] == [4] * 40


@pytest.mark.parametrize("late", [True, False])
def test_a_device_that_works_late_is_waited_for(late: bool, tmp_path: Path) -> None:
    """Copies too. If its marks waited for nothing, this would be seen."""
    device = LateDevice(copy_seconds=0.0005, work_seconds=0.001)
    device.mark = device.mark if late else lambda: lambda: None  # type: ignore[method-assign]
    pool, _ = make(3, tmp_path, device, host_pages=4)
    pool.extend(12)
    for _ in range(4):
        for _, page in pool.sweep(range(12)):
            last = device.launch(partial(page.add_, 1))
    last.result()
    found = [device.launch(partial(page.unique)).result() for _, page in pool.sweep(range(12), write=False)]
    assert ([values.tolist() for values in found] == [[4]] * 12) == late
    assert device.peak == 3 * PAGE


class SlowToWrite(Counted):
    """Takes its time over page 0."""

    def write(self, start: int, source: Tensor) -> None:
        time.sleep(0.1 if start == 0 else 0)
        super().write(start, source)


def test_a_page_is_not_read_before_it_is_written(tmp_path: Path) -> None:
    memory = Memory()
    pool = PagePool(PAGE, 2 * PAGE, memory, [SlowToWrite(memory, tmp_path)])
    pool.extend(3)
    for sweep, order in enumerate(
        [(2, 1, 0), (0, 2, 1), (0, 1, 2)]
    ):  # 0 leaves last, and comes first into another slot
        for _, page in pool.sweep(order):
            assert int(page[0]) == sweep
            page.add_(1)


def test_all_that_fits_needs_no_disk(tmp_path: Path) -> None:
    pool, disk = make(5, tmp_path / "absent")
    pool.extend(5)
    assert sum(1 for _ in pool.sweep(range(5))) == 5
    assert (disk.reads, disk.writes) == (0, 0)
    with pytest.raises(ResourceError, match="absent"):
        pool.extend(1)
    assert (pool.pages, sum(1 for _ in pool.sweep(range(5)))) == (5, 5)


def test_a_failed_transfer_is_raised_and_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = make(2, tmp_path)
    pool.extend(6)
    list(pool.sweep(range(6)))

    def fail(*args: object) -> int:
        raise OSError(5, os.strerror(5))

    def sweep_twice() -> None:
        for _ in range(2):
            list(pool.sweep(range(6)))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(ResourceError, match=r"cannot be written: Input/output error\. The disk reports an error"):
            sweep_twice()
    with pytest.raises(ResourceError, match="Input/output error"):
        sweep_twice()


def test_the_pool_goes_when_nothing_refers_to_it(tmp_path: Path) -> None:
    pool, _ = make(2, tmp_path)
    pool.extend(9)
    list(pool.sweep(range(9)))
    workers = list(pool._workers._threads)
    assert all(worker.is_alive() for worker in workers)
    del pool
    gc.collect()
    for worker in workers:
        worker.join(timeout=5)
    assert not any(worker.is_alive() for worker in workers)
    assert list(tmp_path.iterdir()) == []
