"""Linear4bit: the product and its gradient, state dicts, and bytes that nothing may cast."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import ConfigError, ModelError
from halfbyte.nn import Linear4bit
from halfbyte.quant import quantize

OUT, IN = 48, 192


@pytest.fixture(params=[(True, True), (True, False), (False, True)], ids=["double-bias", "double", "single-bias"])
def layer(request: pytest.FixtureRequest) -> Linear4bit:
    double_quant, bias = request.param
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator)
    return Linear4bit.from_weight(
        weight, torch.randn(OUT, generator=generator) if bias else None, double_quant=double_quant
    )


def bytes_of(layer: Linear4bit) -> list[Tensor]:
    weight = layer.quantized_weight
    return [tensor.clone() for tensor in (layer.weight.detach().view(-1), *weight.op_args[:3]) if tensor is not None]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, after, strict=True))


def bound(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a product of n terms in `dtype`, summed in fp32, may be from the exact one: the classical bound.

    n * eps32 * sum |x| |w| for the sum, and one rounding of each weight and of the result to a 16-bit dtype.
    """
    magnitude = x.double().abs() @ weight.double().abs().t()
    terms, eps = x.shape[-1] + 1, torch.finfo(torch.float32).eps
    if dtype != torch.float32:
        eps = terms * eps + 1.5 * torch.finfo(dtype).eps
        return eps * (magnitude + 4)  # 4: the largest bias
    return terms * eps * (magnitude + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, IN), (5, IN), (2, 40, IN), (IN,), (0, IN)])
def test_forward_and_backward(layer: Linear4bit, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against F.linear on the dequantized weight in fp64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    grad_y = torch.randn((*shape[:-1], OUT), generator=generator).to(dtype)
    weight = layer.dequantize(torch.float32)
    y = layer(x)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    assert y.dtype == grad_x.dtype == dtype
    bias = None if layer.bias is None else layer.bias.double()
    exact = nn.functional.linear(x.detach().double(), weight.double(), bias)
    assert ((y.double() - exact).abs() <= bound(x.detach(), weight, dtype)).all()
    exact = grad_y.double() @ weight.double()
    assert ((grad_x.double() - exact).abs() <= bound(grad_y, weight.t(), dtype)).all()


def test_compute_dtype(layer: Linear4bit) -> None:
    """The product runs in compute_dtype, what comes out has the dtype of what went in."""
    x = torch.randn(7, IN)
    layer.compute_dtype = torch.bfloat16
    expected = layer(x.bfloat16()).float()
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), expected)


def test_only_codes_are_kept_for_backward(layer: Linear4bit) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(4, IN, requires_grad=True))
    assert saved
    assert sum(tensor.nbytes for tensor in saved) <= layer.quantized_weight.nbytes


def test_nothing_is_trainable(layer: Linear4bit) -> None:
    assert not [name for name, p in layer.named_parameters() if p.requires_grad]
    assert not layer(torch.randn(2, IN)).requires_grad


def test_bias_may_be_trained() -> None:
    layer = Linear4bit.from_weight(torch.randn(OUT, IN), torch.zeros(OUT))
    layer.bias.requires_grad_()
    grad = torch.randn(2, 3, OUT)
    layer(torch.randn(2, 3, IN)).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


def test_state_dict_round_trip(layer: Linear4bit) -> None:
    state = layer.state_dict()
    assert "weight.quant_state.bitsandbytes__nf4" in state
    assert "absmax" not in state
    other = Linear4bit(IN, OUT, layer.bias is not None, double_quant=layer.nested_absmax is not None)
    assert not same(bytes_of(other), bytes_of(layer))
    report = other.load_state_dict(state)
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert same(bytes_of(other), bytes_of(layer))
    x = torch.randn(3, IN)
    assert torch.equal(other(x), layer(x))


def test_state_dict_decides_the_recipe() -> None:
    """Codebook, block size and double quantization come from the file, not from the layer it is loaded into."""
    stored = Linear4bit.from_weight(torch.randn(OUT, IN), quant_type="fp4", blocksize=32, double_quant=False)
    layer = Linear4bit(IN, OUT, bias=False)
    layer.load_state_dict(stored.state_dict())
    assert (layer.quant_type, layer.blocksize, layer.nested_absmax) == ("fp4", 32, None)
    assert torch.equal(layer.dequantize(), stored.dequantize())


def test_wrong_state_dicts(layer: Linear4bit) -> None:
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="weight is not a 4-bit weight: its quant_state is missing"):
        layer.load_state_dict({key: value for key, value in state.items() if key in ("weight", "bias")})
    with pytest.raises(ModelError, match="weight: "):
        layer.load_state_dict({key: value for key, value in state.items() if not key.endswith("weight.absmax")})
    with pytest.raises(ConfigError, match="does not fit a layer of"):
        Linear4bit(OUT, IN, layer.bias is not None).load_state_dict(state)


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to dtype": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "to type": lambda m: m.type(torch.float64),
    "cpu": lambda m: m.cpu(),
    "deepcopy": copy.deepcopy,
    "in a Sequential": lambda m: nn.Sequential(m).half()[0],
    "train and eval": lambda m: m.train().eval(),
    "requires_grad_ false": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("move", MOVES)
def test_bytes_survive(layer: Linear4bit, move: str) -> None:
    x = torch.randn(3, IN)
    before, y = bytes_of(layer), layer(x)
    moved = MOVES[move](layer)
    assert isinstance(moved, Linear4bit)
    assert same(bytes_of(moved), before)
    assert torch.equal(moved(x), y)


def saved_and_loaded(layer: Linear4bit) -> Linear4bit:
    buffer = io.BytesIO()
    torch.save(layer, buffer)  # what multiprocessing does to a module
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
def test_copies_stand_alone(layer: Linear4bit, duplicate: Callable[[Linear4bit], Linear4bit]) -> None:
    """A copy shares nothing with the original, and holds its codes once."""
    twin = duplicate(layer)
    before = bytes_of(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert twin._codes.data_ptr() == twin.weight.data_ptr()
    assert type(twin.weight) is type(layer.weight)
    with torch.no_grad():
        twin.weight.fill_(0)
    assert same(bytes_of(layer), before)
    assert not torch.equal(twin.dequantize(), layer.dequantize())


def test_from_quantized_shares_memory() -> None:
    weight = quantize(torch.randn(OUT, IN))
    layer = Linear4bit.from_quantized(weight)
    assert layer.weight.data_ptr() == weight.codes.data_ptr() == layer.quantized_weight.codes.data_ptr()
    assert layer.absmax.data_ptr() == weight.absmax.data_ptr()


def test_adapters_are_not_rounded_in(layer: Linear4bit) -> None:
    """What PEFT's lora.Linear does to merge is refused, with the way out."""
    with pytest.raises(ConfigError, match=r"merge: a 4-bit weight cannot take an adapter in.*dequantize\(\)"):
        layer.weight.data += torch.ones(OUT, IN)
    with pytest.raises(ConfigError, match="cannot take an adapter in"):
        layer.weight.data -= torch.ones(OUT, IN)
