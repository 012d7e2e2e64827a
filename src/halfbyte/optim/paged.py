"""Moments in pages: beside their parameters up to a budget, then (beside a GPU) in host memory, then on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.checkpoint.shard_writer import Pieces
from halfbyte.dtypes import format_bytes
from halfbyte.kernels.adamw import BLOCKSIZE
from halfbyte.optim.moments import MOMENTS, Run, zero_moments
from halfbyte.quant.blocks import num_blocks
from halfbyte.store import ALIGNMENT, PagePool, memory_of, tiers_behind

PAGE_BYTES = 1 << 20
"""Larger ones are not faster (docs/memory.md); a small budget has smaller ones."""
LEAST_BUDGET = 2 * ALIGNMENT
NO_LIMIT = 1 << 62
_BLOCK_BYTES = {32: 2 * 4 * BLOCKSIZE, 8: 2 * (BLOCKSIZE + 4)}
"""What a block of elements takes in a page. A parameter's last block takes as much, so all begin at multiples of 8."""


class _Place(NamedTuple):
    """Where in its page a run's moments are."""

    run: Run
    bits: int
    offset: int

    def moments(self, page: Tensor) -> list[Tensor]:
        """Views of `page`, uint8 (page_bytes,): one for each moment, in the operators' order."""
        count, start, views = self.run.stop - self.run.start, self.offset, []
        blocks = num_blocks(count, BLOCKSIZE)
        for name in MOMENTS[self.bits]:
            is_scale = name.endswith("absmax")
            itemsize = 1 if self.bits == 8 and not is_scale else 4
            used = (blocks if is_scale else count) * itemsize
            views.append(page[start : start + used].view(torch.uint8 if itemsize == 1 else torch.float32))
            start += blocks * (1 if is_scale else BLOCKSIZE) * itemsize
        return views


class PagedMoments:
    """The moments of parameters of one device. Any size is paged, and small parameters share pages.

    Args:
        device: the parameters'.
        budget: bytes of its memory that the moments may take, at least LEAST_BUDGET.
        host_budget: of a GPU's moments, bytes of host memory they may take beside.
        folder: where the scratch file for the rest goes, if it is needed.
    """

    def __init__(self, device: torch.device, budget: int, host_budget: int, folder: str | Path) -> None:
        memory = memory_of(device)
        page_bytes = min(PAGE_BYTES, max(ALIGNMENT, budget // 8 // ALIGNMENT * ALIGNMENT))
        self._device = device
        self._tiers = tiers_behind(memory, host_budget, folder, page_bytes)
        self._pool = PagePool(page_bytes, budget, memory, self._tiers)
        self._bits: dict[Tensor, int] = {}
        self._pages: dict[Tensor, list[int]] = {}
        self._places: list[list[_Place]] = []
        """Of each page."""
        self._room = 0
        """Bytes that are free in the last page."""

    def bits(self, param: Tensor) -> int:
        """Of the moments of a parameter that was placed."""
        return self._bits[param]

    def place(self, params: Mapping[Tensor, int]) -> None:
        """Make room for parameters that have none yet, with the bits of each; their moments are zeros.

        Raises:
            ResourceError: the disk has no room, or refuses; nothing has changed.
            ValueError: a parameter is on another device.
        """
        new: list[tuple[int, _Place]] = []
        page, room = len(self._places) - 1, self._room
        for param, bits in params.items():
            if param.device != self._device:
                raise ValueError(f"paged moments are on one device, not on {self._device} and {param.device}")
            start, block = 0, _BLOCK_BYTES[bits]
            while start < param.numel():
                if room < block:
                    page, room = page + 1, self._pool.page_bytes
                stop = min(start + room // block * BLOCKSIZE, param.numel())
                new.append((page, _Place(Run(param, start, stop), bits, self._pool.page_bytes - room)))
                room -= num_blocks(stop - start, BLOCKSIZE) * block
                start = stop
        more = page + 1 - len(self._places)
        self._pool.extend(more)
        self._places += ([] for _ in range(more))
        self._room = room
        for page, place in new:
            self._places[page].append(place)
            self._pages.setdefault(place.run.param, []).append(page)
        self._bits |= params

    def sweep(self, params: Iterable[Tensor], *, write: bool = True) -> Iterator[list[tuple[Run, list[Tensor]]]]:
        """The runs of these parameters with their moments, page by page; the moments are good until the next page.

        Args:
            params: placed before.
            write: the moments will be changed.
        """
        wanted = set(params)
        pages = sorted({page for param in wanted for page in self._pages.get(param, ())})
        for page, memory in self._pool.sweep(pages, write=write):
            yield [(place.run, place.moments(memory)) for place in self._places[page] if place.run.param in wanted]

    def pieces(self, param: Tensor) -> dict[str, Pieces]:
        """The moments of a parameter that was placed, page by page."""
        wanted = zero_moments(param, self._bits[param], "meta")
        return {
            name: Pieces(like.dtype, tuple(like.shape), self._parts(param, number))
            for number, (name, like) in enumerate(wanted.items())
        }

    def _parts(self, param: Tensor, number: int) -> Iterator[Tensor]:
        for runs in self.sweep([param], write=False):
            yield from (moments[number] for _, moments in runs)

    def __str__(self) -> str:
        total, fast = (format_bytes(n) for n in (self._pool.pages * self._pool.page_bytes, self._pool.resident_bytes))
        places = ", ".join([f"{fast} in memory", *(str(tier) for tier in self._tiers if tier.nbytes)])
        return f"{total} in pages of {format_bytes(self._pool.page_bytes)}: {places}"
