"""Root-mean-square norms against float64 and against transformers' modules, on every instruction set.

Inputs are standard normal, so results are of order 1; gradients too, times the largest rstd where that exceeds 1.
Measured over these cases, float32 is off by at most 1.6e-6 forward and 1.5e-6 backward; the bound leaves a margin
of 3. A 16-bit result adds one rounding to its own type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BOUND = 5e-6
WIDTHS = [1, 7, 33, 576, 11008]
HEADS, KV_HEADS = 4, 2

ops = torch.ops.halfbyte


def assert_close(found: Tensor, exact: Tensor, bound: float = BOUND) -> None:
    excess = ((found.double() - exact).abs() - bound - EPS[found.dtype] * exact.abs()).max().item()
    assert excess <= 0, f"{excess=} {found.dtype=} {found.shape=}"


def exact_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * rstd * (offset + weight), rstd.squeeze(-1)


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_equal_the_oracle(isa: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    for rows, weight_dtype, offset, eps in ((5, torch.float32, 0.0, 1e-6), (3, dtype, 1.0, 0.1)):
        x, delta, g, add = (torch.randn(rows, width).to(dtype) for _ in range(4))
        weight = torch.randn(width).to(weight_dtype)
        exact = x.double().requires_grad_()
        exact_y, exact_rstd = exact_norm(exact, weight.double(), eps, offset)
        (exact_dx,) = torch.autograd.grad(exact_y, exact, g.double())
        y, rstd = ops.rms_norm(x, weight, eps, offset)
        assert (y.dtype, rstd.dtype) == (dtype, torch.float32)
        assert_close(y, exact_y)
        assert_close(rstd, exact_rstd, BOUND * exact_rstd.max().item())
        size = BOUND * max(1.0, exact_rstd.max().item())
        assert_close(ops.rms_norm_backward(g, x, weight, rstd, offset, None), exact_dx, size)
        assert_close(ops.rms_norm_backward(g, x, weight, rstd, offset, add), exact_dx + add.double(), size)

        total, y, rstd = ops.add_rms_norm(x, delta, weight, eps, offset)
        assert torch.equal(total, x + delta)
        again = ops.rms_norm(total, weight, eps, offset)
        assert torch.equal(y, again[0])
        assert torch.equal(rstd, again[1])


def heads_case(dtype: torch.dtype, head_dim: int, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * head_dim).to(dtype)
    return qkv, torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("head_dim", [1, 7, 33, 128])
def test_head_norms_equal_the_oracle(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(head_dim)
    qkv, q_weight, k_weight = heads_case(dtype, head_dim)
    q_weight[0] = 0.0  # the output says nothing of this element; the gradient must not ask it
    exact = qkv.double().requires_grad_()
    q, k, v = exact.unflatten(1, (-1, head_dim)).split([HEADS, KV_HEADS, KV_HEADS], 1)
    normed = [exact_norm(part, w.double(), 1e-6, 0.0) for part, w in ((q, q_weight), (k, k_weight))]
    exact_out = torch.cat([normed[0][0], normed[1][0], v], 1).flatten(1)
    g = torch.randn_like(qkv)
    (exact_dx,) = torch.autograd.grad(exact_out, exact, g.double())

    out, rstd = ops.rms_norm_heads(qkv, q_weight, k_weight, HEADS, KV_HEADS, 1e-6, 0.0)
    assert_close(out, exact_out)
    exact_rstd = torch.cat([normed[0][1], normed[1][1]], 1)
    assert_close(rstd, exact_rstd, BOUND * exact_rstd.max().item())
    assert torch.equal(out[:, -KV_HEADS * head_dim :], qkv[:, -KV_HEADS * head_dim :])
    ops.rms_norm_heads_backward_(g, qkv, q_weight, k_weight, rstd, HEADS, KV_HEADS, 0.0)
    assert_close(g, exact_dx, BOUND * max(1.0, exact_rstd.max().item()))


@pytest.mark.parametrize(("module", "offset"), [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_norms_are_those_of_transformers(isa: str, module: Callable[..., Any], offset: float) -> None:
    """Float32: equal up to the order of sums. bfloat16: Llama's rounds twice, ours once."""
    for dtype, bound in ((torch.float32, BOUND), (torch.bfloat16, 2.0**-8 * 18)):
        norm = module(576, eps=1e-5).to(dtype)
        norm.weight.data.normal_()
        x, g = torch.randn(2, 9, 576).to(dtype).requires_grad_(), torch.randn(2, 9, 576).to(dtype)
        wanted = norm(x)
        (wanted_dx,) = torch.autograd.grad(wanted, x, g)
        y, rstd = ops.rms_norm(x.detach(), norm.weight.detach(), 1e-5, offset)
        torch.testing.assert_close(y, wanted.detach(), rtol=2 * EPS[dtype], atol=BOUND)
        dx = ops.rms_norm_backward(g, x.detach(), norm.weight.detach(), rstd, offset, None)
        torch.testing.assert_close(dx, wanted_dx, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", list(EPS))
def test_threads_change_nothing(isa: str, dtype: torch.dtype) -> None:
    x, delta, g, add = (torch.randn(300, 1000).to(dtype) for _ in range(4))
    qkv, q_weight, k_weight = heads_case(dtype, 64, rows=300)
    weight, dqkv = torch.randn(1000), torch.randn_like(qkv)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            total, y, rstd = ops.add_rms_norm(x, delta, weight, 1e-6, 0.0)
            dx = ops.rms_norm_backward(g, total, weight, rstd, 0.0, add)
            out, head_rstd = ops.rms_norm_heads(qkv, q_weight, k_weight, HEADS, KV_HEADS, 1e-6, 0.0)
            grad = dqkv.clone()
            ops.rms_norm_heads_backward_(grad, qkv, q_weight, k_weight, head_rstd, HEADS, KV_HEADS, 0.0)
            results.append((total, y, rstd, dx, out, head_rstd, grad))
    finally:
        torch.set_num_threads(before)
    if isa != "baseline":  # torch's own sums promise nothing
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


def test_rows_that_are_not_contiguous(isa: str) -> None:
    x, weight = torch.randn(33, 6).t(), torch.randn(66)[::2]
    y, rstd = ops.rms_norm(x, weight, 1e-6, 0.0)
    torch.testing.assert_close(y, ops.rms_norm(x.contiguous(), weight.contiguous(), 1e-6, 0.0)[0])
    dx = ops.rms_norm_backward(x, x, weight, rstd, 0.0, x)
    dense = x.contiguous()
    torch.testing.assert_close(dx, ops.rms_norm_backward(dense, dense, weight, rstd, 0.0, dense))
    qkv, q_weight, k_weight = heads_case(torch.float32, 16)
    wide = torch.randn(3, 2 * qkv.shape[1])
    grad, strided = wide[:, ::2].contiguous(), wide[:, ::2]
    _, rstd = ops.rms_norm_heads(qkv, q_weight, k_weight, HEADS, KV_HEADS, 1e-6, 0.0)
    for g in (grad, strided):
        ops.rms_norm_heads_backward_(g, qkv, q_weight, k_weight, rstd, HEADS, KV_HEADS, 0.0)
    torch.testing.assert_close(grad, strided)


def test_nan_stays_in_its_row(isa: str) -> None:
    for width in (7, 33, 576):
        x = torch.randn(3, width)
        x[1, width - 1] = torch.nan
        y, rstd = ops.rms_norm(x, torch.ones(width), 1e-6, 0.0)
        dx = ops.rms_norm_backward(torch.ones_like(x), x, torch.ones(width), rstd, 0.0, None)
        for result in (y, rstd[:, None], dx):
            assert result[1].isnan().all()
            assert result[[0, 2]].isfinite().all()


def test_wrong_inputs_are_refused(isa: str) -> None:
    x, weight, rstd = torch.randn(3, 32), torch.randn(32), torch.ones(3)
    wrong = [
        lambda: ops.rms_norm(x, weight[:31], 1e-6, 0.0),
        lambda: ops.rms_norm(x.double(), weight, 1e-6, 0.0),
        lambda: ops.rms_norm(x, weight.int(), 1e-6, 0.0),
        lambda: ops.add_rms_norm(x, x[:2], weight, 1e-6, 0.0),
        lambda: ops.add_rms_norm(x, x.half(), weight, 1e-6, 0.0),
        lambda: ops.rms_norm_backward(x, x, weight, rstd[:2], 0.0, None),
        lambda: ops.rms_norm_backward(x, x, weight, rstd.half(), 0.0, None),
        lambda: ops.rms_norm_backward(x, x, weight, rstd, 0.0, x[:, :31]),
        lambda: ops.rms_norm_heads(x, weight[:8], weight[:8], 3, 1, 1e-6, 0.0),
        lambda: ops.rms_norm_heads(x, weight[:8], weight[:4], 2, 1, 1e-6, 0.0),
        lambda: ops.rms_norm_heads(x, weight[:8], weight[:8].half(), 2, 1, 1e-6, 0.0),
        lambda: ops.rms_norm_heads(x, weight[:8], weight[:8], 6, -1, 1e-6, 0.0),
        lambda: ops.rms_norm_heads_backward_(x, x, weight[:8], weight[:8], rstd, 2, 1, 0.0),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"no norm|weights? |beside x|rstd |rows of|the gradient"):
            call()


def test_empty(isa: str) -> None:
    y, rstd = ops.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6, 0.0)
    assert (y.shape, rstd.shape) == ((0, 8), (0,))
    out, rstd = ops.rms_norm_heads(torch.empty(0, 64), torch.ones(8), torch.ones(8), HEADS, KV_HEADS, 1e-6, 0.0)
    assert (out.shape, rstd.shape) == ((0, 64), (0, 6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch 2.13 tracing; nothing of ours is in it
def test_opcheck() -> None:
    x, weight, rstd = torch.randn(3, 32), torch.randn(32).bfloat16(), torch.rand(3)
    opcheck(ops.rms_norm, (x, weight, 1e-6, 0.0))
    opcheck(ops.add_rms_norm, (x, x.flip(0), weight, 1e-6, 1.0))
    opcheck(ops.rms_norm_backward, (x, x.flip(0), weight, rstd, 0.0, x.flip(1)))
    opcheck(ops.rms_norm_heads, (x, weight[:8], weight[8:16], 2, 1, 1e-6, 0.0))
    opcheck(ops.rms_norm_heads_backward_, (x, x.flip(0), weight[:8], weight[8:16], torch.rand(3, 3), 2, 1, 0.0))
