"""AdamW on pages: the native kernel is the specification to the bit, however pages are cut and threads share them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.kernels.adamw import BLOCKSIZE, plain_adamw_8bit_, plain_adamw_32bit_
from halfbyte.quant.blocks import num_blocks
from halfbyte.quant.codebook import unsigned_dynamic_boundaries, unsigned_dynamic_map

OPTIONS = (1e-3, 0.9, 0.99, 1e-8, 0.01)
"""lr, beta1, beta2, eps, weight_decay."""
SIZES = [1, 255, 256, 257, 4096, 10_001]
PLAIN = {32: plain_adamw_32bit_, 8: plain_adamw_8bit_}

Page = list[Tensor]


def fresh(size: int, bits: int) -> Page:
    """param, then moments of 0, in the order of the operator's arguments."""
    param = torch.randn(size, generator=torch.Generator().manual_seed(size))
    if bits == 32:
        return [param, torch.zeros(size), torch.zeros(size)]
    blocks = num_blocks(size, BLOCKSIZE)
    return [param, *(t for _ in range(2) for t in (torch.zeros(size, dtype=torch.uint8), torch.zeros(blocks)))]


def gradient(size: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Magnitudes over six decades, single zeros, and one block of nothing else."""
    generator = torch.Generator().manual_seed(1000 + step)
    grad = torch.randn(size, generator=generator) * 10 ** (-6 * torch.rand(size, generator=generator))
    grad[size // 2 : size // 2 + 7] = 0
    grad[256:512] = 0
    return grad.to(dtype)


def call(operator: Any, pages: list[Page], grads: list[Tensor], step: int) -> None:
    params, *moments = ([page[i] for page in pages] for i in range(len(pages[0])))
    operator(params, grads, *moments, *OPTIONS, step)


def served(bits: int) -> Any:
    return getattr(torch.ops.halfbyte, f"adamw_{bits}bit_").default


def trained(bits: int, sizes: list[int], dtype: torch.dtype = torch.float32, operator: Any = None) -> list[Page]:
    pages = [fresh(size, bits) for size in sizes]
    for step in range(1, 6):
        call(operator or served(bits), pages, [gradient(size, step, dtype) for size in sizes], step)
    return pages


def assert_equal(pages: list[Page], others: list[Page]) -> None:
    for number, (page, other) in enumerate(zip(pages, others, strict=True)):
        assert [torch.equal(a, b) for a, b in zip(page, other, strict=True)] == [True] * len(page), number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_equals_the_specification_to_the_bit(isa: str, bits: int, dtype: torch.dtype) -> None:
    assert_equal(trained(bits, SIZES, dtype), trained(bits, SIZES, dtype, PLAIN[bits]))


@pytest.mark.parametrize("bits", [32, 8])
def test_threads_change_nothing(isa: str, bits: int) -> None:
    sizes = [1000, 300_001, 5]
    grads = [[gradient(size, step) for size in sizes] for step in (1, 2)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            pages = [fresh(size, bits) for size in sizes]
            for step in (1, 2):
                call(served(bits), pages, grads[step - 1], step)
            results.append(pages)
    finally:
        torch.set_num_threads(before)
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize("bits", [32, 8])
def test_page_size_changes_nothing(isa: str, bits: int) -> None:
    """Whole, or cut at any multiples of 256 into views: the same bytes in every tensor."""
    size = 10_001
    whole, cut = fresh(size, bits), fresh(size, bits)
    for step, length in enumerate((256, 512, 2048, 9984, size), start=1):
        grad = gradient(size, step)
        call(served(bits), [whole], [grad], step)
        for start in range(0, size, length):
            stop = min(start + length, size)
            blocks = slice(start // BLOCKSIZE, num_blocks(stop, BLOCKSIZE))
            page = [t[start:stop] if t.numel() == size else t[blocks] for t in cut]
            call(served(bits), [page], [grad[start:stop]], step)
    assert_equal([whole], [cut])


def test_every_code_comes_back(isa: str) -> None:
    """With nothing added and nothing decayed, moments keep their codes: each value is the nearest to itself."""
    codes = torch.arange(256, dtype=torch.uint8)
    scale = torch.tensor([0.37])
    page = [torch.zeros(256), codes.clone(), scale.clone(), codes.clone(), scale.clone()]
    served(8)([page[0]], [torch.zeros(256)], *([t] for t in page[1:]), 0.0, 1 - 2**-40, 1 - 2**-40, 1e-8, 0.0, 1)
    assert torch.equal(page[1], codes)
    assert torch.equal(page[3], codes)
    assert torch.equal(page[2], scale)
    assert torch.equal(page[4], scale)


def test_codes_at_the_boundaries(isa: str) -> None:
    """Numbers on, just below and just above each boundary of the unsigned map, against the specification."""
    bounds = torch.cat([unsigned_dynamic_boundaries(), unsigned_dynamic_map()[1:]])
    values = torch.cat([bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-1.0)).abs()])
    values = torch.nn.functional.pad(values, (0, -values.numel() % 255)).view(-1, 255)
    grad = torch.cat([values, torch.ones(values.shape[0], 1)], dim=1).flatten()  # each block's largest is 1
    results = []
    for operator in (served(8), plain_adamw_8bit_):
        for sign in (1, -1):
            page = fresh(grad.numel(), 8)
            # exp_avg becomes the gradient itself, exp_avg_sq its square; by the second step both go through the codes.
            operator([page[0]], [sign * grad], *([t] for t in page[1:]), 1e-3, 0.0, 0.0, 1e-8, 0.0, 1)
            results.append(page)
    assert_equal(results[:2], results[2:])


@pytest.mark.parametrize("bits", [32, 8])
def test_nothing_to_do(isa: str, bits: int) -> None:
    call(served(bits), [fresh(0, bits)], [torch.zeros(0)], 1)
    served(bits)(*([[]] * (6 if bits == 8 else 4)), *OPTIONS, 1)


def test_a_zero_moment_alone_has_the_code_of_zero() -> None:
    """bitsandbytes rounds small second moments to 0 and divides by it. Measured with gradients over five decades, half
    of each gradient noise: single steps of 25,832 lr; 3.3 lr as it is here, 1.4 lr with 32 bits."""
    size, lr = 2048, 1e-3
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** (-5 * torch.rand(size, generator=generator))
    mean = scale * torch.randn(size, generator=generator).sign()
    pages = {bits: fresh(size, bits) for bits in (32, 8)}
    largest = dict.fromkeys(pages, 0.0)
    for step in range(1, 201):
        grad = 0.5 * (mean + scale * torch.randn(size, generator=generator))
        for bits, page in pages.items():
            before = page[0].clone()
            served(bits)([page[0]], [grad], *([t] for t in page[1:]), lr, 0.9, 0.999, 1e-8, 0.0, step)
            largest[bits] = max(largest[bits], float((page[0] - before).abs().max()) / lr)
    assert largest[32] < 2
    assert largest[8] < 8


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_declared_right(bits: int, dtype: torch.dtype) -> None:
    params, *moments = ([t] for t in fresh(700, bits))
    torch.library.opcheck(served(bits), (params, [gradient(700, 1, dtype)], *moments, *OPTIONS, 1))


@pytest.mark.parametrize("bits", [32, 8])
def test_wrong_pages_are_refused(isa: str, bits: int) -> None:
    """Instead of being read or written past their end."""
    good, grad = fresh(700, bits), torch.zeros(700)
    for place in range(len(good)):
        for bad in (good[place][:-1], good[place].double(), good[place].repeat_interleave(2)[::2]):
            page = [*good[:place], bad, *good[place + 1 :]]
            with pytest.raises(ValueError, match="page 0"):
                call(served(bits), [page], [grad], 1)
    for bad in (grad[:-1], grad.half()):
        with pytest.raises(ValueError, match="page 0"):
            call(served(bits), [good], [bad], 1)
    with pytest.raises(ValueError, match="zip"):
        call(served(bits), [good], [grad, grad], 1)
