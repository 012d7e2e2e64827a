"""Large tensors where earlier ones lay: never more mapped than was in use at once, and no byte shared by two."""

from __future__ import annotations

import random

import torch

from halfbyte.kernels import buffers
from halfbyte.kernels.buffers import LEAST_BYTES, Buffers, empty, steady_memory

FLOATS = LEAST_BYTES // 4


def test_memory_is_used_again() -> None:
    pool = Buffers()
    first = pool.empty((FLOATS,), torch.float32)
    place = first.data_ptr()
    assert pool.live == pool.most == pool.resident == LEAST_BYTES
    del first
    second = pool.empty((2, FLOATS // 2), torch.float32)
    assert second.data_ptr() == place
    assert second.shape == (2, FLOATS // 2)
    assert pool.resident == LEAST_BYTES


def test_a_view_keeps_the_memory() -> None:
    pool = Buffers()
    tensor = pool.empty((4, FLOATS), torch.float32)
    row = tensor[2]
    row.fill_(7)
    del tensor
    other = pool.empty((4, FLOATS), torch.float32)
    other.zero_()
    assert bool((row == 7).all())
    assert pool.live == 8 * LEAST_BYTES


def test_random_lives_never_share_a_byte_and_never_take_more_than_the_most_in_use() -> None:
    """2,000 tensors of random sizes and lifetimes, each filled with its number and looked at before it dies."""
    rng, pool = random.Random(0), Buffers()
    held: list[tuple[int, torch.Tensor]] = []
    live = most = 0
    for number in range(2000):
        while held and (len(held) > 12 or rng.random() < 0.45):
            written, tensor = held.pop(rng.randrange(len(held)))
            assert int(tensor[0]) == int(tensor[-1]) == written
            assert int(tensor[len(tensor) // 2]) == written
            live -= tensor.nbytes
            del tensor
        tensor = pool.empty((FLOATS + rng.randrange(8 * FLOATS),), torch.int32)
        live += tensor.nbytes
        most = max(most, live)
        tensor.fill_(number)
        held.append((number, tensor))
        assert pool.live == live
        assert pool.most == most
        assert pool.resident <= most + 4096 * len(held)  # the last page of each is whole


def test_release_gives_back_what_is_unused() -> None:
    pool = Buffers()
    kept = pool.empty((FLOATS,), torch.float32)
    pool.empty((8 * FLOATS,), torch.float32)
    assert pool.release() == 8 * LEAST_BYTES
    assert pool.resident == pool.most == LEAST_BYTES
    kept.fill_(1)


def test_operators_use_the_buffers_of_the_block_and_torch_outside() -> None:
    small, large = (3, 5), (FLOATS + 3,)
    assert buffers._current is None
    with steady_memory() as pool:
        tensor = empty(large, torch.bfloat16)
        assert pool.live == 0  # half the bytes of float32: below the least
        tensor = empty(large, torch.float32)
        assert pool.live == tensor.nbytes
        empty(small, torch.float32)
        with steady_memory() as inner:
            assert inner is pool
        assert buffers._current is pool
        x = torch.randn(1, 2 * FLOATS)
        y = torch.ops.halfbyte.gated(x, "silu")
        assert pool.live == tensor.nbytes + y.nbytes
    assert buffers._current is None
    torch.testing.assert_close(y, torch.nn.functional.silu(x[:, :FLOATS]) * x[:, FLOATS:])
    assert torch.equal(torch.ops.halfbyte.gated(x, "silu"), y)
