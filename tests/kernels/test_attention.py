"""Packed attention against a float64 oracle written out sequence by sequence, on every instruction set.

Inputs are standard normal, so outputs are of order 1, gradients of order a few. Measured over these cases, the worst
errors in float32 are 1.6e-6 forward and 4.0e-6 backward, with scores of up to 80 2.2e-5 and 3.2e-4; bounds leave a
margin of 3. A 16-bit result adds one rounding to its own type, and the gradients what delta = rowsum(g * out) loses by
`out` having been rounded: measured 3.6 such roundings, 8 allowed.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FORWARD_BOUND = 5e-6
BACKWARD_BOUND = 1.2e-5

attention, backward = torch.ops.halfbyte.packed_attention, torch.ops.halfbyte.packed_attention_backward


def starts_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


FAMILY = ([9, 20, 7, 0, 45, 70, 1, 33, 5], [-1, 0, 1, 1, 1, 0, -1, 6, -1])
"""Lengths and parents: a tree of three levels with an empty sequence in it, a small one, and a lone sequence."""


def int32(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def oracle(
    qkv: Tensor, heads: int, kv_heads: int, starts: Tensor, scale: float, window: int, parents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64, with autograd of torch's own functions: every sequence with all that it goes on from."""
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    outs, lses, tokens = [], [], {-1: list[int]()}
    for s, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
        tokens[s] = tokens[-1 if parents is None else int(parents[s])] + list(range(start, stop))
        n = len(tokens[s])
        q, k, v = qkv[tokens[s]].double().unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        i, j = torch.arange(n)[:, None], torch.arange(n)
        visible = (j <= i) & (j > i - (window or n))
        scores = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~visible, -torch.inf)
        own = slice(n - (stop - start), n)
        outs.append(torch.einsum("hij,jhd->ihd", F.softmax(scores, -1), v).flatten(1)[own])
        lses.append(scores.logsumexp(-1)[:, own])
    return torch.cat(outs), torch.cat(lses, 1)


def assert_close(found: Tensor, exact: Tensor, bound: float) -> None:
    eps = EPS.get(found.dtype, 0.0)
    excess = ((found.double() - exact).abs() - bound - eps * exact.abs()).max().item()
    assert excess <= 0, f"{excess=} {found.dtype=} {found.shape=}"


def check(qkv: Tensor, *case: Any, size: float = 1.0) -> None:
    """Forward and backward of `case` against the oracle; bounds grow with `size`."""
    exact_qkv = qkv.double().requires_grad_()
    exact_out, exact_lse = oracle(exact_qkv, *case)
    out, lse = attention(qkv, *case)
    assert out.dtype == qkv.dtype
    assert lse.dtype == torch.float32
    assert_close(out, exact_out, FORWARD_BOUND * size)
    assert_close(lse, exact_lse, FORWARD_BOUND * size)
    g = torch.randn_like(out)
    dqkv = backward(g, qkv, out, lse, *case)
    (exact_dqkv,) = torch.autograd.grad(exact_out, exact_qkv, g.double())
    assert_close(dqkv, exact_dqkv, BACKWARD_BOUND * size + 8 * EPS[qkv.dtype])


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (9, 3), (8, 1), (1, 1)])
@pytest.mark.parametrize("window", [0, 1, 7, 40, 1000])
def test_equals_the_oracle(isa: str, dtype: torch.dtype, heads: int, kv_heads: int, window: int) -> None:
    torch.manual_seed(heads)
    starts = starts_of(1, 7, 0, 33, 64, 130, 2)
    qkv = torch.randn(int(starts[-1]), (heads + 2 * kv_heads) * 16).to(dtype)
    check(qkv, heads, kv_heads, starts, 0.25, window)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("window", [0, 1, 7, 40])
def test_sequences_that_go_on_from_others(isa: str, dtype: torch.dtype, window: int) -> None:
    torch.manual_seed(window)
    starts = starts_of(*FAMILY[0])
    qkv = torch.randn(int(starts[-1]), 10 * 16).to(dtype)
    check(qkv, 6, 2, starts, 0.25, window, int32(FAMILY[1]))


@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 80, 96, 128, 256, 264, 20])
def test_head_dims(isa: str, head_dim: int) -> None:
    torch.manual_seed(head_dim)
    starts = starts_of(100, 3, 219)
    qkv = torch.randn(int(starts[-1]), 4 * head_dim)
    check(qkv, 2, 1, starts, head_dim**-0.5, 0)
    check(qkv, 2, 1, starts, head_dim**-0.5, 50)


def test_large_scores(isa: str) -> None:
    """Scores of about +-80 and a far larger one: nothing overflows, and a lone winner takes all."""
    torch.manual_seed(0)
    starts = starts_of(200)
    qkv = torch.randn(200, 3 * 64)
    check(qkv, 1, 1, starts, 2.5, 0, size=80.0)
    qkv[50, 64:128] *= 1000
    out, lse = attention(qkv, 1, 1, starts, 2.5, 0)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    assert torch.isfinite(backward(torch.randn_like(out), qkv, out, lse, 1, 1, starts, 2.5, 0)).all()


def test_nothing_crosses_a_boundary(isa: str) -> None:
    """What a sequence gives does not move by a bit with its neighbours, not even with NaN in them."""
    torch.manual_seed(0)
    starts = starts_of(13, 100, 30)
    case = (4, 2, starts, 0.2, 0)
    qkv, g = torch.randn(143, 8 * 24), torch.randn(143, 4 * 24)
    out, lse = attention(qkv, *case)
    grads = backward(g, qkv, out, lse, *case)
    qkv[:13], qkv[113:] = torch.randn(13, 8 * 24), torch.nan
    out_after, lse_after = attention(qkv, *case)
    grads_after = backward(g, qkv, out_after, lse_after, *case)
    for before, after in ((out, out_after), (lse.t(), lse_after.t()), (grads, grads_after)):
        assert torch.equal(before[13:113], after[13:113])
    assert out_after[113:].isnan().all()


@pytest.mark.parametrize("family", [False, True])
@pytest.mark.parametrize("dtype", EPS)
def test_threads_do_not_change_a_bit(isa: str, dtype: torch.dtype, family: bool) -> None:
    torch.manual_seed(0)
    starts = starts_of(5, 800, 90, 64)  # the backward of 800 tokens is split into several tasks
    case = (6, 2, starts, 0.2, 0, int32([-1, 0, 0, 2]) if family else None)
    qkv, g = torch.randn(959, 10 * 16).to(dtype), torch.randn(959, 6 * 16).to(dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, lse = attention(qkv, *case)
        results.append((out, lse, backward(g, qkv, out, lse, *case)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"], indirect=True)
def test_more_keys_than_are_packed_at_once(isa: str) -> None:
    """1600 tokens of four heads of 256 are more than 32 MB: the heads are taken in two turns."""
    torch.manual_seed(0)
    starts = starts_of(1600)
    qkv, g = torch.randn(1600, 3 * 4 * 256), torch.randn(1600, 4 * 256)
    out, lse = attention(qkv, 4, 4, starts, 1 / 16, 0)
    dqkv = backward(g, qkv, out, lse, 4, 4, starts, 1 / 16, 0).view(1600, 3, 4, 256)
    for head in (0, 3):
        alone = qkv.view(1600, 3, 4, 256)[:, :, head].flatten(1)
        columns = slice(256 * head, 256 * (head + 1))
        out_alone, lse_alone = attention(alone, 1, 1, starts, 1 / 16, 0)
        assert torch.equal(out_alone, out[:, columns])
        assert torch.equal(lse_alone[0], lse[head])
        grads = backward(g[:, columns].contiguous(), alone, out_alone, lse_alone, 1, 1, starts, 1 / 16, 0)
        assert_close(dqkv[:, :, head].flatten(1), grads.double(), BACKWARD_BOUND)


def test_default_has_the_right_gradients() -> None:
    starts = starts_of(1, 4, 6)
    qkv = torch.randn(11, 4 * 3, dtype=torch.float64, requires_grad=True)
    for parents in (None, int32([-1, 0, 0])):
        assert torch.autograd.gradcheck(lambda x, p=parents: attention(x, 2, 1, starts, 0.6, 3, p)[0], qkv)


def test_opcheck() -> None:
    starts = starts_of(3, 9)
    qkv = torch.randn(12, 8 * 8, requires_grad=True)
    for parents in (None, int32([-1, 0])):
        case = (4, 2, starts, 0.3, 0, parents)
        torch.library.opcheck(attention, (qkv, *case))
        out, lse = (x.detach() for x in attention(qkv, *case))
        torch.library.opcheck(backward, (torch.randn_like(out), qkv.detach(), out, lse, *case))


def test_no_tokens() -> None:
    for starts in (starts_of(), starts_of(0, 0)):
        qkv = torch.empty(0, 3 * 8, requires_grad=True)
        out, lse = attention(qkv, 1, 1, starts, 1.0, 0)
        assert out.shape == (0, 8)
        assert lse.shape == (1, 0)
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads over"),
        ({"heads": 8}, "columns"),
        ({"window": -1}, "window"),
        ({"seq_starts": starts_of(5, 3)}, "rise"),
        ({"seq_starts": starts_of(5, 6, -1, 2)}, "rise"),
        ({"seq_starts": starts_of(4, 8) - 1}, "rise"),
        ({"seq_starts": starts_of(12).long()}, "int32"),
        ({"parents": int32([0])}, "sequence 0 does not follow its parent 0"),
        ({"parents": int32([-2])}, "sequence 0 does not follow its parent -2"),
        ({"seq_starts": starts_of(3, 3, 6), "parents": int32([-1, -1, 0])}, "sequence 2 does not follow its parent 0"),
        ({"parents": int32([-1, -1])}, "parents is not"),
        ({"parents": torch.tensor([-1])}, "parents is not"),
        ({"qkv": torch.zeros(12, 64, dtype=torch.int32)}, "qkv is"),
        ({"qkv": torch.zeros(12, 8, 8)}, "qkv is"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    case = {
        "qkv": torch.randn(12, 64), "heads": 4, "kv_heads": 2, "seq_starts": starts_of(12), "scale": 1.0, "window": 0,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        attention(**case | change)


def test_wrong_gradients_are_refused() -> None:
    case = (1, 1, starts_of(4), 1.0, 0)
    qkv = torch.randn(4, 24)
    out, lse = attention(qkv, *case)
    for wrong in ((out[:3], out, lse), (out, out.half(), lse), (out, out, lse.t()), (out, out, lse.double())):
        with pytest.raises(RuntimeError, match=r"g, out|lse"):
            backward(wrong[0], qkv, *wrong[1:], *case)
