"""The rotary embedding against float64 and against transformers' functions, on every instruction set.

Rotated standard normal numbers are of order 1; float32's worst error over these cases is 4.5e-7, the bound leaves a
margin of 3. A 16-bit result adds one rounding to its own type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BOUND = 1.5e-6

rope_ = torch.ops.halfbyte.rope_


def matrix(cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """The linear map of a head for each token, (T, head_dim, head_dim), in float64."""
    rotary_dim = cos.shape[1]
    half = rotary_dim // 2
    result = torch.eye(head_dim, dtype=torch.float64).repeat(cos.shape[0], 1, 1)
    for i in range(rotary_dim):
        result[:, i, i] = cos[:, i]
        result[:, i, (i + half) % rotary_dim] = -sin[:, i] if i < half else sin[:, i]
    return result


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (14, 14), (64, 64), (96, 72), (33, 18), (128, 128)])
def test_rotation_equals_the_oracle(isa: str, head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    """Also where the two halves of cos and sin differ: no Llama does that, but the inverse stays the transpose."""
    torch.manual_seed(head_dim)
    tokens, heads, others = 5, 3, 2
    for angle_dtype in {torch.float32, dtype}:
        cos, sin = (torch.randn(tokens, rotary_dim).to(angle_dtype) for _ in range(2))
        turn = matrix(cos, sin, head_dim)
        for inverse in (False, True):
            qkv = torch.randn(tokens, (heads + others) * head_dim).to(dtype)
            exact = qkv.double().unflatten(1, (-1, head_dim))
            exact[:, :heads] = torch.einsum("tji,thi->thj", turn.mT if inverse else turn, exact[:, :heads])
            exact = exact.flatten(1)
            found = qkv.clone()
            rope_(found, cos, sin, heads, head_dim, inverse)
            excess = ((found.double() - exact).abs() - BOUND - EPS[dtype] * exact.abs()).max().item()
            assert excess <= 0, f"{excess=}"
            assert torch.equal(found[:, heads * head_dim :], qkv[:, heads * head_dim :])


@pytest.mark.parametrize(("module", "rotary_dim"), [(modeling_llama, 64), (modeling_phi3, 48)])
def test_rotation_is_that_of_transformers(isa: str, module: Any, rotary_dim: int) -> None:
    apply: Callable[..., tuple[Tensor, Tensor]] = module.apply_rotary_pos_emb
    tokens, heads, kv_heads, head_dim = 40, 4, 2, 64
    angles = torch.arange(tokens)[:, None] * 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, requires_grad=True)
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    wanted = torch.cat([*apply(q, k, cos, sin, unsqueeze_dim=1), v], 1).flatten(1)
    g = torch.randn_like(wanted)
    (wanted_gradient,) = torch.autograd.grad(wanted, qkv, g)
    found = qkv.detach().clone()
    rope_(found, cos, sin, heads + kv_heads, head_dim, False)
    rope_(g, cos, sin, heads + kv_heads, head_dim, True)
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=BOUND)
    torch.testing.assert_close(g, wanted_gradient, rtol=0, atol=BOUND)


def test_threads_change_nothing(isa: str) -> None:
    qkv, cos, sin = torch.randn(700, 512).bfloat16(), torch.randn(700, 64), torch.randn(700, 64)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(qkv.clone())
            rope_(results[-1], cos, sin, 6, 64, False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_edges(isa: str) -> None:
    """Rows with gaps, rotary dimensions beyond the kernel's, no tokens, no heads; NaN stays in its pair."""
    wide, cos, sin = torch.randn(4, 128), torch.randn(4, 16), torch.randn(4, 16)
    strided, dense = wide[:, :64], wide[:, :64].contiguous()
    for qkv in (strided, dense):
        rope_(qkv, cos, sin, 3, 16, False)
    torch.testing.assert_close(strided, dense)

    long, angle = torch.randn(2, 1040), torch.full((2, 1040), 0.5)
    exact = torch.einsum("tji,ti->tj", matrix(angle, angle, 1040), long.double())
    rope_(long, angle, angle, 1, 1040, False)
    torch.testing.assert_close(long.double(), exact, rtol=0, atol=BOUND)

    rope_(wide[:0], cos[:0], sin[:0], 3, 16, False)
    before = dense.clone()
    rope_(dense, cos, sin, 0, 16, False)
    rope_(dense, cos[:, :0], sin[:, :0], 3, 16, False)
    assert torch.equal(dense, before)

    dense[1, 3] = torch.nan
    rope_(dense, cos, sin, 3, 16, False)
    assert dense.isnan().nonzero().tolist() == [[1, 3], [1, 11]]


def test_wrong_inputs_are_refused(isa: str) -> None:
    qkv, cos = torch.randn(4, 64), torch.randn(4, 16)
    for arguments in (
        (qkv, cos[:3], cos[:3], 2, 16, False),
        (qkv, cos, cos[:, :14], 2, 16, False),
        (qkv, cos, cos.half(), 2, 16, False),
        (qkv, cos[:, :15], cos[:, :15], 2, 16, False),
        (qkv, cos, cos, 2, 14, False),
        (qkv, cos, cos, 5, 16, False),
        (qkv, cos, cos, -1, 16, False),
        (qkv.double(), cos, cos, 2, 16, False),
        (qkv[0], cos, cos, 2, 16, False),
    ):
        with pytest.raises(ValueError, match=r"no rotation|not \(T, rotary_dim\)|rows of"):
            rope_(*arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch 2.13 tracing; nothing of ours is in it
def test_opcheck() -> None:
    for inverse in (False, True):
        opcheck(rope_, (torch.randn(3, 64), torch.randn(3, 8), torch.randn(3, 8), 3, 16, inverse))
