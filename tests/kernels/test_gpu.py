"""Every operator with CUDA tensors gives what it gives with CPU tensors. ``pytest -m gpu``; needs a CUDA device.

The Triton kernels by themselves, to the bit: triton_cases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.kernels.registry import CUDA_KERNELS, CUDA_VARIABLE, cuda_choice
from halfbyte.nn import Linear4bit
from halfbyte.quant import quantize

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")
]  # fmt: skip
OPS = torch.ops.halfbyte


def on(device: str, value: Any) -> Any:
    """`value` with copies of its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return [on(device, item) for item in value] if isinstance(value, list) else value


def tensors_of(*values: Any) -> list[Tensor]:
    flat: list[Tensor] = []
    for value in values:
        flat += [value] if isinstance(value, Tensor) else tensors_of(*value) if isinstance(value, list | tuple) else []
    return flat


def check(op: Callable[..., Any], *args: Any, bound: float = 2e-4) -> None:
    """The results, and what the operator changed of its arguments, agree relative to their largest element."""
    here, there = on("cpu", list(args)), on(DEVICE, list(args))
    expected, result = op(*here), op(*there)
    pairs = zip(tensors_of(expected, here), tensors_of(result, there), strict=True)
    for one, other in pairs:
        assert other.device.type == DEVICE
        one, other = one.double(), other.cpu().double()
        assert (one - other).abs().max() <= bound * max(float(one.abs().max()), 1e-6) if one.numel() else True


@pytest.fixture(params=CUDA_KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each kind of kernel in turn."""
    if request.param != "reference":
        pytest.importorskip(request.param)
    monkeypatch.setenv(CUDA_VARIABLE, request.param)
    cuda_choice.cache_clear()
    yield request.param
    cuda_choice.cache_clear()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("m", [1, 5, 100, 600])
@pytest.mark.usefixtures("kernels")
def test_four_bit_products(m: int, double_quant: bool) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(200, 320), double_quant=double_quant)
    for dtype, bound in ((torch.float32, 2e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        x, grad, bias = (torch.randn(*shape).to(dtype) for shape in ((m, 320), (m, 200), (200,)))
        check(OPS.linear_4bit, x, *weight.op_args, 200, bias, bound=bound)
        check(OPS.linear_4bit_dx, grad, *weight.op_args, 320, bound=bound)
        check(OPS.dequantize_4bit, *weight.op_args, [200, 320], dtype, bound=0)
    check(OPS.quantize_4bit, torch.randn(200, 320), "nf4", 64, bound=0)


def test_a_layer_moves_and_trains() -> None:
    torch.manual_seed(0)
    layer, x = Linear4bit.from_weight(torch.randn(96, 128), torch.randn(96)), torch.randn(3, 128)
    moved = Linear4bit.from_quantized(layer.quantized_weight, layer.bias).to(DEVICE)
    assert {tensor.device.type for tensor in moved.state_dict().values()} <= {DEVICE, "cpu"}
    results = []
    for module, device in ((layer, "cpu"), (moved, DEVICE)):
        leaf = x.to(device, copy=True).requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append((y.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)
    back = moved.to("cpu")
    assert torch.equal(back.dequantize(), layer.dequantize())


def test_adapters() -> None:
    torch.manual_seed(0)
    members = [quantize(torch.randn(out, 128)) for out in (96, 64)]
    group = (
        [w.codes for w in members], [w.absmax for w in members], [w.nested_absmax for w in members],
        [w.nested_offset for w in members], "nf4", 64, [96, 64], [torch.randn(96), None],
        [torch.randn(8, 128), None], [torch.randn(96, 8), None], [2.0, 1.0],
    )  # fmt: skip
    x, g = torch.randn(10, 128), torch.randn(10, 160)
    check(OPS.lora_linear_4bit, x, *group)
    check(OPS.lora_linear_4bit_backward, g, x, x @ group[8][0].T, *group, True)


def test_head_and_loss() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(20, 64), torch.randn(300, 64).bfloat16()
    check(OPS.linear_frozen, x, weight, None)
    check(OPS.linear_frozen_dx, torch.randn(20, 300), weight)
    check(OPS.softmax_cross_entropy_, torch.randn(20, 300), torch.randint(300, (20,)))


def test_attention() -> None:
    torch.manual_seed(0)
    qkv, starts = torch.randn(30, 8 * 32), torch.tensor([0, 7, 30], dtype=torch.int32)
    for window in (0, 5):
        out, lse = OPS.packed_attention(qkv, 4, 2, starts, 0.2, window)
        check(OPS.packed_attention, qkv, 4, 2, starts, 0.2, window)
        check(OPS.packed_attention_backward, torch.randn_like(out), qkv, out, lse, 4, 2, starts, 0.2, window)


def test_elementwise() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 64), torch.randn(64)
    y, rstd = OPS.rms_norm(x, weight, 1e-5, 0.0)
    check(OPS.rms_norm, x, weight, 1e-5, 0.0)
    check(OPS.add_rms_norm, x, torch.randn_like(x), weight, 1e-5, 1.0)
    check(OPS.rms_norm_backward, torch.randn_like(x), x, weight, rstd, 0.0, y)
    check(OPS.rope_, x, torch.randn(9, 16), torch.randn(9, 16), 3, 16, False)
    for activation in ("silu", "gelu_tanh"):
        check(OPS.gated, x, activation)
        check(OPS.gated_backward, torch.randn(9, 32), x, activation)


def test_adamw() -> None:
    torch.manual_seed(0)
    numbers, zeros = (1e-3, 0.9, 0.999, 1e-8, 0.01, 1), [torch.zeros(500)]
    param, grad = [torch.randn(500)], [torch.randn(500)]
    check(OPS.adamw_32bit_, param, grad, zeros, zeros, *numbers)
    codes, absmax = [torch.full((500,), 127, dtype=torch.uint8)], [torch.zeros(2)]
    check(OPS.adamw_8bit_, param, grad, codes, absmax, [torch.zeros(500, dtype=torch.uint8)], absmax, *numbers)
