"""Several processes that train together: which of them this one is, and all that they say to each other."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from halfbyte.errors import ResourceError

PATIENCE = timedelta(minutes=10)
"""How long ranks wait for one that does not answer; one that has ended is noticed at once."""
BUCKET = 2**22
"""Gradients that travel together, so that their copy stays small: 16 MB."""
_FAILED = "failed"


class LostRankError(ResourceError):
    """Another rank has ended (exit 4)."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, as torchrun started them; by default there is one.

    All methods that say something are to be called by all ranks, in the same order. One process alone says nothing.

    Attributes:
        rank: of this process, 0 to world - 1; rank 0 writes, prints and decides.
        world: how many there are.
        local_rank, local_world: the same among those on this machine.
        attempt: how often torchrun has started them anew, where it keeps their store: what an earlier attempt left
            there is not of this one.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    attempt: int = 0

    @property
    def leads(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    def total(self, *values: float) -> list[float]:
        """Sums over all ranks, in float64."""
        return self._combined(values, dist.ReduceOp.SUM)

    def most(self, *values: float) -> list[float]:
        """The largest of all ranks' values."""
        return self._combined(values, dist.ReduceOp.MAX)

    def first(self, value: Any) -> Any:
        """What rank 0 has for `value`, plain JSON."""
        return self.said_by(0, value)

    def said_by(self, rank: int, value: Any) -> Any:
        """What `rank` has for `value`, plain JSON."""
        if self.world == 1:
            return value
        text = json.dumps(value).encode() if self.rank == rank else b""
        (size,) = self.most(len(text))
        data = torch.frombuffer(bytearray(text.ljust(int(size))), dtype=torch.uint8)
        self.give([data], rank)
        return json.loads(data.numpy().tobytes())

    def give(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Every rank's `tensors`, which are as large on all, become those of `rank`."""
        with _noticing_the_dead():
            for tensor in tensors:
                dist.broadcast(tensor, rank)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each of `parameters` that is trained the sum of all ranks' gradients, the same to the bit on each."""
        if self.world == 1:
            return
        for bucket in _buckets([p for p in parameters if p.requires_grad]):
            for p in bucket:
                if p.grad is None:  # no sample of this step is this rank's
                    p.grad = torch.zeros_like(p)
            grads = [p.grad for p in bucket if p.grad is not None]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            with _noticing_the_dead():
                dist.all_reduce(flat)
            for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(summed.view_as(grad))

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All ranks in a row, as FSDP2 takes them."""
        return init_device_mesh(device.type, (self.world,))

    def seed_step(self, seed: int, step: int) -> None:
        """Have random numbers (dropout) depend on seed, step and rank alone: no checkpoint need hold each rank's."""
        if self.world > 1:
            torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + self.rank) % 2**63)

    def _combined(self, values: tuple[float, ...], how: Any) -> list[float]:
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with _noticing_the_dead():
            dist.all_reduce(numbers, how)
        return [float(number) for number in numbers]


ALONE = Ranks()


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """Inside the block the ranks can talk. One that fails tells the others why, and they end too.

    Raises:
        LostRankError: another rank failed, or ended without a word.
    """
    if ranks.world == 1 or dist.is_initialized():  # by the caller, who also sees to it that ranks fail together
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _noticing_the_dead():
        shared, _, _ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=PATIENCE))
        store = PrefixStore(f"halfbyte-{ranks.attempt}", shared)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=PATIENCE)
    try:
        yield
    except KeyboardInterrupt:  # which all of them get
        raise
    except Exception as error:
        _tell(store, ranks, error)
        raise
    finally:
        dist.destroy_process_group()


def _tell(store: Store, ranks: Ranks, error: BaseException) -> None:
    """Leave the reason for the others; or end because of theirs, which is said on this machine once.

    Raises:
        LostRankError: another rank was first.
    """
    own = first = f"{platform.node()}|{ranks} failed: {' '.join(str(error).split())}"
    with suppress(RuntimeError):  # where a rank that is gone held the store
        first = store.compare_set(_FAILED, "", own).decode()
    if first != own:
        machine, _, why = first.partition("|")
        ended = LostRankError(f"{ranks} ends", why=why.rstrip("."))
        ended.said = machine == platform.node() or ranks.local_rank > 0
        raise ended from error


@contextmanager
def _noticing_the_dead() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        silent = f"has not answered for {PATIENCE.total_seconds() / 60:.0f} minutes"
        raise LostRankError(
            f"another rank {silent if 'imed out' in str(error) else 'ended without a word'}", where="ranks",
            why=str(error).splitlines()[0].rpartition("] ")[2].split(". ")[0][:120],
            fix="Look for what killed it (memory?); the same command goes on from the newest checkpoint, as torchrun "
            "--max-restarts does by itself",
        ) from error  # fmt: skip


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
