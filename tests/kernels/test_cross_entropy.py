"""softmax_cross_entropy_ and linear_cross_entropy against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from halfbyte.quant.int8 import quantize_int8

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def oracle(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and softmax - onehot in float64."""
    exact = logits.double()
    loss = F.cross_entropy(exact, targets, reduction="sum")
    return loss, exact.softmax(1) - F.one_hot(targets, logits.shape[1])


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (3, 5), (300, 33), (17, 1000), (2, 49152), (2, 50257)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_equals_the_oracle(isa: str, n: int, vocab: int, dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(vocab)
    logits, targets = (torch.randn(n, vocab) * scale).to(dtype), torch.randint(0, vocab, (n,))
    loss, grad = oracle(logits, targets)
    result = logits.clone()
    found = torch.ops.halfbyte.softmax_cross_entropy_(result, targets)
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert found.item() == pytest.approx(loss.item(), rel=3e-7, abs=1e-6 * n)
    # Relative to each probability: the rounding of x - max, exp, its sum and a product; then that of the result.
    below = logits.double().amax(1, keepdim=True) - logits.double()
    softmax = grad + F.one_hot(targets, vocab)
    bound = (1e-6 + 2.0**-24 * below) * softmax + 2 * EPS[dtype] * grad.abs()
    smallest = 2.0**-24 if dtype == torch.float16 else 1.2e-38  # of a normal number, or fp16's smallest
    excess = ((result.double() - grad).abs() - bound).max().item()
    assert excess <= smallest, f"{excess=}"


def test_extreme_logits(isa: str) -> None:
    """Far below the maximum is exactly 0, -inf too; nothing overflows."""
    logits = torch.tensor([[0.0, -1e30, 3e38, 5.0], [-float("inf"), 0.0, -200.0, -87.0], [-3e38, -3e38, -3e38, -3e38]])
    targets = torch.tensor([2, 1, 0])
    loss, grad = oracle(logits, targets)
    found = torch.ops.halfbyte.softmax_cross_entropy_(logits, targets)
    torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), grad, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_stay_visible(isa: str, value: float) -> None:
    for position in (0, 40, 99):
        logits = torch.randn(3, 100)
        logits[1, position] = value
        assert torch.ops.halfbyte.softmax_cross_entropy_(logits, torch.tensor([1, 2, 3])).isnan()
        assert logits[1].isnan().any()
        assert torch.isfinite(logits[[0, 2]]).all()


def test_strided_logits(isa: str) -> None:
    base = torch.randn(10, 80)
    before = base.clone()
    targets = torch.randint(0, 33, (10,))
    torch.ops.halfbyte.softmax_cross_entropy_(base[:, 3:36], targets)
    torch.testing.assert_close(base[:, 3:36].double(), oracle(before[:, 3:36], targets)[1], rtol=0, atol=1e-6)
    assert torch.equal(base[:, 36:], before[:, 36:])


@pytest.mark.parametrize("target", [-100, -1, 33])
def test_refuses_a_target_outside_the_vocabulary(isa: str, target: int) -> None:
    logits = torch.randn(3, 33)
    before = logits.clone()
    with pytest.raises(IndexError, match=f"target {target} is not in a vocabulary of 33"):
        torch.ops.halfbyte.softmax_cross_entropy_(logits, torch.tensor([0, target, 1]))
    assert torch.equal(logits, before)
    with pytest.raises(IndexError, match="vocabulary of 33"):
        torch.ops.halfbyte.linear_cross_entropy(
            torch.randn(3, 8), torch.tensor([0, target, 1]), torch.randn(33, 8), None, 2, True
        )


def test_refuses_wrong_types_and_shapes(isa: str) -> None:
    for logits, targets, message in (
        (torch.randn(3, 5), torch.zeros(3, dtype=torch.int32), "int64"),
        (torch.randn(3, 5), torch.zeros(4, dtype=torch.int64), "targets of"),
        (torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "floating"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.halfbyte.softmax_cross_entropy_(logits, targets)


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_over_a_linear_head(isa: str, dtype: torch.dtype, weight_dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(61, 40).to(dtype), torch.randint(0, 333, (61,))
    weight, offset = (torch.randn(333, 40) / 3).to(weight_dtype), torch.randn(333).to(dtype) if bias else None
    exact = hidden.double().requires_grad_()
    logits = F.linear(exact, weight.double(), None if offset is None else offset.double())
    loss = F.cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    assert exact.grad is not None
    for rows in (7, 16, 61, 1000):
        found, dx = torch.ops.halfbyte.linear_cross_entropy(hidden, targets, weight, offset, rows, True)
        without, nothing = torch.ops.halfbyte.linear_cross_entropy(hidden, targets, weight, offset, rows, False)
        assert torch.equal(found, without)
        assert nothing.numel() == 0
        assert dx.dtype == dtype
        tolerance = 1e-6 + 4 * (EPS[dtype] if dtype != torch.float32 else 0)
        assert found.item() == pytest.approx(loss.item(), rel=tolerance)
        torch.testing.assert_close(dx.double(), exact.grad, rtol=0, atol=tolerance * 5)


def test_gradient(isa: str) -> None:
    hidden, targets = torch.randn(20, 16, requires_grad=True), torch.randint(0, 50, (20,))
    weight = torch.randn(50, 16).bfloat16()
    loss, _ = torch.ops.halfbyte.linear_cross_entropy(hidden, targets, weight, None, 8, True)
    (grad,) = torch.autograd.grad(3 * loss, hidden)
    expected = F.cross_entropy(hidden @ weight.float().t(), targets, reduction="sum")
    torch.testing.assert_close(grad, 3 * torch.autograd.grad(expected, hidden)[0], rtol=1e-5, atol=1e-5)
    loss, _ = torch.ops.halfbyte.linear_cross_entropy(hidden, targets, weight, None, 8, False)
    with pytest.raises(RuntimeError, match="need_dx"):
        loss.backward()


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"], indirect=True)  # torch's products promise less
def test_threads_change_nothing(isa: str) -> None:
    logits, targets = torch.randn(67, 1003), torch.randint(0, 1003, (67,))
    hidden, weight = torch.randn(67, 64), torch.randn(1003, 64).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            grad = logits.clone()
            results.append(
                (
                    torch.ops.halfbyte.softmax_cross_entropy_(grad, targets),
                    grad,
                    *torch.ops.halfbyte.linear_cross_entropy(hidden, targets, weight, None, 30, True),
                )
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch 2.13 tracing with aot_autograd
def test_schema(isa: str) -> None:
    targets = torch.randint(0, 33, (5,))
    opcheck(torch.ops.halfbyte.softmax_cross_entropy_, (torch.randn(5, 33), targets))
    weight = torch.randn(33, 8).bfloat16()
    for hidden in (torch.randn(5, 8), torch.randn(5, 8, requires_grad=True)):
        opcheck(torch.ops.halfbyte.linear_cross_entropy, (hidden, targets, weight, None, 2, True))
        int8 = quantize_int8(weight)
        opcheck(torch.ops.halfbyte.linear_cross_entropy, (hidden, targets, int8[0], None, 2, True, int8[1]))
