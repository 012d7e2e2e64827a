"""The fused PEFT layer against PEFT's own: same results, same names, its forward for everything else."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.errors import ConfigError
from halfbyte.nn import Linear4bit
from halfbyte.nn.lora_linear import LoraLinear, fuse_lora_layers

IN, OUT = 128, 96


def adapted(bias: bool = True, compute_dtype: torch.dtype | None = None, **lora: object) -> peft.PeftModel:
    """One Linear4bit under PEFT, its B not zero."""
    torch.manual_seed(0)
    layer = Linear4bit.from_weight(
        torch.randn(OUT, IN), torch.randn(OUT) if bias else None, compute_dtype=compute_dtype
    )
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["0"]} | lora)  # type: ignore[arg-type]
    model = peft.get_peft_model(nn.Sequential(layer), config)
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def wrapper(model: peft.PeftModel) -> PeftLinear:
    return model.base_model.model[0]


def results(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    learned = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *learned], grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 7, IN), (IN,), (0, IN), (1, IN)])
def test_equals_peft(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    model = adapted(bias)
    torch.manual_seed(2)
    x, grad = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], OUT).to(dtype)
    theirs = results(model, x, grad)
    assert fuse_lora_layers(model) == 1
    assert isinstance(wrapper(model), LoraLinear)
    ours = results(model, x, grad)
    # Measured: 2e-6 of the largest value in float32, one rounding in 16 bits (two on native bfloat16).
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    for one, two in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        if one.numel():
            assert (one.double() - two.double()).abs().max() <= tolerance * two.double().abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_dora_equals_peft(bias: bool) -> None:
    """The lengths of rows without decoding them: measured 1e-6 of the largest value."""
    model = adapted(bias, use_dora=True)
    layer = wrapper(model)
    layer.lora_magnitude_vector["default"].weight.data *= torch.rand(OUT) + 0.5
    x, grad = torch.randn(3, 7, IN), torch.randn(3, 7, OUT)
    theirs = results(model, x, grad)
    assert len(theirs) == 5
    fuse_lora_layers(model)
    for one, two in zip(results(model, x, grad), theirs, strict=True):
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()


def test_compute_dtype() -> None:
    model = adapted(compute_dtype=torch.bfloat16)
    x, grad = torch.randn(9, IN), torch.randn(9, OUT)
    theirs = results(model, x, grad)
    fuse_lora_layers(model)
    for one, two in zip(results(model, x, grad), theirs, strict=True):
        assert one.dtype == torch.float32
        assert (one - two).abs().max() <= 2.0**-6 * two.abs().max()


def test_saves_no_output_and_no_weight() -> None:
    model = adapted()
    fuse_lora_layers(model)
    saved: list[Tensor] = []
    x = torch.randn(50, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    layer = wrapper(model)
    learned = sum(p.nbytes for p in layer.parameters() if p.requires_grad)
    activations = x.nbytes + 50 * 8 * 4
    assert sum(t.nbytes for t in saved) <= layer.base_layer.quantized_weight.nbytes + learned + activations


def test_x_may_need_no_gradient() -> None:
    model = adapted()
    fuse_lora_layers(model)
    model(torch.randn(5, IN)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def dropout(model: peft.PeftModel) -> None:
    wrapper(model).lora_dropout["default"] = nn.Dropout(0.5)


def two_adapters(model: peft.PeftModel) -> None:
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])


def hook(model: peft.PeftModel) -> None:
    wrapper(model).base_layer.register_forward_hook(lambda *_: None)


def half_adapter(model: peft.PeftModel) -> None:
    wrapper(model).lora_A["default"].bfloat16()


UNUSUAL: dict[str, Callable[[peft.PeftModel], object]] = {
    "dropout": dropout,
    "two adapters": two_adapters,
    "no adapter": lambda model: wrapper(model).enable_adapters(False),
    "hook": hook,
    "half adapter": half_adapter,
    "trained bias": lambda model: wrapper(model).base_layer.bias.requires_grad_(),
}


@pytest.mark.parametrize("change", UNUSUAL)
def test_the_unusual_goes_to_peft(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    fuse_lora_layers(model)
    UNUSUAL[change](model)
    calls = []
    monkeypatch.setattr(PeftLinear, "forward", lambda self, x: calls.append(change) or x)
    model(torch.randn(2, IN))
    assert calls == [change]


def test_a_bias_of_the_adapter_goes_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(lora_bias=True)
    fuse_lora_layers(model)
    calls = []
    monkeypatch.setattr(PeftLinear, "forward", lambda self, x: calls.append(x) or x)
    model(torch.randn(2, IN))
    assert len(calls) == 1


def test_autocast_goes_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    fuse_lora_layers(model)
    calls = []
    monkeypatch.setattr(PeftLinear, "forward", lambda self, x: calls.append(x) or x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, IN))
    assert len(calls) == 1


def test_dropout_only_while_training() -> None:
    model = adapted(lora_dropout=0.5)
    x = torch.randn(4, IN)
    fuse_lora_layers(model)
    model.eval()
    first = model(x)
    fused = wrapper(model)
    torch.testing.assert_close(first, PeftLinear.forward(fused, x), rtol=1e-5, atol=1e-5)
    model.train()
    assert not torch.equal(model(x), first)


def test_names_saving_and_switching() -> None:
    model = adapted()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    saved = peft.get_peft_model_state_dict(model)
    assert fuse_lora_layers(model) == 1
    assert fuse_lora_layers(model) == 0
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    again = peft.get_peft_model_state_dict(model)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)

    x = torch.randn(3, IN)
    first = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), wrapper(model).base_layer(x))
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["0"]))
    model.set_adapter("other")
    torch.testing.assert_close(model(x), wrapper(model).base_layer(x))  # its B is zero
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    with pytest.raises(ConfigError, match="cannot take an adapter in"):
        model.merge_and_unload()


def losses(*, fused: bool) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            base.set_submodule(name, Linear4bit.from_weight(module.weight.detach()))
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))
    fill(model)
    if fused:
        assert fuse_lora_layers(model) == 14
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, found = torch.randint(64, (2, 24)), []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_training_is_the_same() -> None:
    """A seeded run: PEFT's forward and the fused one stay together."""
    plain, fused = losses(fused=False), losses(fused=True)
    assert plain[-1] < plain[0] - 0.2
    assert fused == pytest.approx(plain, rel=1e-5)
