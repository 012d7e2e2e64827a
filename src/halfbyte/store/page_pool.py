"""Pages that are worked on one after another, of which only some fit into the fast memory.

The work goes over all pages in the same order again and again, so a cache of the pages used last would never hold the
next one. Instead most slots keep the same first pages for good, and the others are a ring through which the rest
passes: while one page is worked on, workers write those behind it back and read those ahead of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from torch import Tensor

from halfbyte.store.memory import Memory
from halfbyte.store.tiers import Tier

RING = 8
"""Slots that pages pass through, at most: more hide the disk's uneven pace better, and keep fewer pages for good."""
WORKERS = 2
"""Transfers under way at once: a disk reads and writes at the same time."""


@dataclass
class _Slot:
    """Room for a page in the fast memory."""

    memory: Tensor
    page: int
    dirty: bool
    """It differs from what the tiers hold."""
    ready: Callable[[], object]
    """Waits for the work on it."""
    arriving: Future[None] | None = None


class PagePool:
    """Pages of `page_bytes` each, zeros at first; at most `budget` bytes of them are in `memory`, the rest in `tiers`.

    One thread works with it. An error of a transfer is raised where its page is needed, and from then on.

    Args:
        page_bytes: a multiple of ALIGNMENT.
        budget: bytes, at least two pages.
        memory: where pages are worked on.
        tiers: where the others are, the fastest first; the last one takes what is left.
    """

    def __init__(self, page_bytes: int, budget: int, memory: Memory, tiers: Sequence[Tier]) -> None:
        assert budget >= 2 * page_bytes, "the least that works is two pages"
        self.page_bytes, self.pages = page_bytes, 0
        self._memory, self._tiers = memory, tiers
        self._slots: list[_Slot] = []
        self._most_slots = budget // page_bytes
        self._kept = self._most_slots
        """Pages below this number never leave the fast memory."""
        self._table: dict[int, _Slot] = {}
        self._leaving: dict[int, Future[None]] = {}
        """Pages that were last seen on their way to a tier."""
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="halfbyte-pages")

    @property
    def resident_bytes(self) -> int:
        """What the pool takes of the fast memory."""
        return len(self._slots) * self.page_bytes

    def extend(self, count: int) -> range:
        """Add `count` pages; their numbers.

        Raises:
            ResourceError: the tiers have no room; nothing has changed.
        """
        new = range(self.pages, self.pages + count)
        if new.stop > self._most_slots:
            kept = self._most_slots - min(RING, max(2, self._most_slots // 3))
            left = new.stop - kept
            for tier in self._tiers:
                here = min(left, tier.capacity // self.page_bytes)
                tier.grow(here * self.page_bytes)
                left -= here
            assert left == 0, "the last tier takes what is left"
            self._kept = kept
        self.pages = new.stop
        fitting = new[: max(0, self._most_slots - new.start)]
        if fitting:
            memory = self._memory.allocate(len(fitting) * self.page_bytes).split(self.page_bytes)
            for page, part in zip(fitting, memory, strict=True):
                self._table[page] = _Slot(part, page, dirty=False, ready=self._memory.mark())
                self._slots.append(self._table[page])
        return new

    def sweep(self, pages: Iterable[int], *, write: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Each page in this order with its bytes, uint8 (page_bytes,), to be used until the next one is asked for.

        Quickest when it is the order of the last time. Whoever breaks off loses nothing.

        Args:
            pages: their numbers, each at most once.
            write: the bytes will be changed.
        """
        order = list(pages)
        place = {page: position for position, page in enumerate(order)}
        missing = [position for position, page in enumerate(order) if page not in self._table]
        heapify(missing)
        ring = [slot for slot in self._slots if slot.page >= self._kept]
        idle = deque(slot for slot in ring if slot.page not in place)
        for page in order:
            if page not in self._table and not idle:  # all hold later pages: an order like no other before
                victim = max(ring, key=lambda slot: place[slot.page])
                heappush(missing, place[victim.page])
                idle.append(victim)
            while missing and idle:
                self._swap(idle.popleft(), order[heappop(missing)])
            slot = self._table[page]
            if slot.arriving is not None:
                slot.arriving.result()
            slot.dirty = slot.dirty or write
            try:
                yield page, slot.memory
            finally:
                slot.ready = self._memory.mark()
            if page >= self._kept:
                idle.append(slot)
        self._prepare(order)

    def _prepare(self, order: list[int]) -> None:
        """Have the first pages of `order` come while other work is done: the next sweep begins with them."""
        ring = [slot for slot in self._slots if slot.page >= self._kept]
        first = [page for page in order if page >= self._kept][: len(ring)]
        missing = [page for page in first if page not in self._table]
        for slot, page in zip([slot for slot in ring if slot.page not in first], missing, strict=False):
            self._swap(slot, page)

    def _swap(self, slot: _Slot, page: int) -> None:
        """Have `slot` hold `page`, when the workers are done."""
        waits = [job for job in (slot.arriving, self._leaving.pop(page, None)) if job is not None]
        out = self._home(slot.page) if slot.dirty else None
        job = self._workers.submit(_transfer, slot.memory, slot.ready, out, self._home(page), waits)
        if slot.dirty:
            self._leaving[slot.page] = job
        del self._table[slot.page]
        self._table[page] = slot
        slot.page, slot.dirty, slot.arriving = page, False, job

    def _home(self, page: int) -> tuple[Tier, int]:
        """The tier of a page that passes through the ring, and where it lies there."""
        number = page - self._kept
        for tier in self._tiers:
            here = tier.capacity // self.page_bytes
            if number < here:
                return tier, number * self.page_bytes
            number -= here
        raise AssertionError("no tier holds it")


def _transfer(
    memory: Tensor, ready: Callable[[], object], out: tuple[Tier, int] | None, into: tuple[Tier, int],
    waits: list[Future[None]],
) -> None:  # fmt: skip
    """A worker's job. It knows nothing of the pool, which may go meanwhile."""
    for job in waits:  # all handed in before this one, so workers never wait for each other in a circle
        job.result()
    ready()
    if out is not None:
        out[0].write(out[1], memory)
    into[0].read(into[1], memory)
