"""Text through two models side by side, a layer at a time and in chunks: the same as all at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from halfbyte.errors import ModelError
from halfbyte.model.lent import LentModel
from halfbyte.model.side_by_side import Multiply, padded_tokens, run_side_by_side
from halfbyte.model.source import open_source
from halfbyte.quant import quantize
from halfbyte.quant.moments import Moments

MakeLlama = Callable[..., Path]

LENGTHS = (70, 70, 33, 120, 64, 5, 17, 64)


@pytest.fixture(scope="module")
def text() -> tuple[Tensor, Tensor]:
    """Sequences of different lengths, padded at the end."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (length,), generator=generator) for length in LENGTHS]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([torch.ones(len(row)).bool() for row in rows], batch_first=True)


def through(
    model: Path, text: tuple[Tensor, Tensor], chunk_tokens: int, dtype: torch.dtype = torch.float32, waiting: int = 0,
    change: Callable[[LentModel], object] = lambda model: None,
) -> dict[str, Moments]:  # fmt: skip
    """Moments by parameter, every layer written as its nearest 4-bit weight."""
    source = open_source(str(model))
    reader = source.open_tensors()
    seen: dict[str, Moments] = {}

    def read(name: str) -> Tensor:
        return torch.full((1,), 1.5) if name.endswith("mlp.scale") else reader.read(name)

    def write(name: str, moments: Moments) -> Multiply:
        seen[name] = moments
        return partial(linear, weight=quantize(reader.read(name).float()).dequantize(dtype))

    names = {name for name in reader.names() if "_proj" in name}
    lent = LentModel(source)
    change(lent)
    run_side_by_side(lent, *text, read, names, write, chunk_tokens=chunk_tokens, waiting_tokens=waiting, dtype=dtype)
    assert seen.keys() == names
    return seen


def test_chunks_change_nothing_but_the_last_bits(tiny_llama: Path, text: tuple[Tensor, Tensor]) -> None:
    """Measured: 2e-6 of the moments' norm."""
    once, chunked = through(tiny_llama, text, 10**6), through(tiny_llama, text, 64)
    for name, moments in once.items():
        for one, other in ((moments.own, chunked[name].own), (moments.cross, chunked[name].cross)):
            assert (one - other).norm() < 2e-5 * one.norm(), name


def layers_entered(seen: list[str]) -> Callable[[LentModel], object]:
    """Notes each pass of text that begins a decoder layer."""

    def add_hooks(model: LentModel) -> None:
        for layer in model.decoder_layers():
            layer.register_forward_pre_hook(lambda *_: seen.append("layer"))

    return add_hooks


@pytest.mark.parametrize("waiting", [10**6, 200])
def test_chunks_that_wait_see_what_those_that_begin_anew_see(
    tiny_llama: Path, text: tuple[Tensor, Tensor], waiting: int
) -> None:
    """To the bit, with all or some of them waiting; and those go through a layer once instead of five times."""
    anew, once = list[str](), list[str]()
    expected = through(tiny_llama, text, 64, change=layers_entered(anew))
    for name, moments in through(tiny_llama, text, 64, waiting=waiting, change=layers_entered(once)).items():
        assert torch.equal(moments.own, expected[name].own), name
        assert torch.equal(moments.cross, expected[name].cross), name
    assert len(once) < (0.4 if waiting > 1000 else 0.9) * len(anew)


def test_no_chunk_waits_in_a_module_that_is_lent_parameters_itself(
    tiny_llama: Path, text: tuple[Tensor, Tensor]
) -> None:
    """They would be taken from it when the first of several passes ends."""

    def change(model: LentModel) -> None:
        mlp = model.decoder_layers()[0].mlp
        mlp.register_parameter("scale", torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False))
        mlp.register_forward_hook(lambda module, args, output: output * module.scale)

    expected, plain = through(tiny_llama, text, 64, change=change), through(tiny_llama, text, 64)
    for name, moments in through(tiny_llama, text, 64, waiting=10**6, change=change).items():
        assert torch.equal(moments.own, expected[name].own), name
    last = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(expected[last].own, plain[last].own)


def test_padded_tokens(text: tuple[Tensor, Tensor]) -> None:
    """Two of 70 and one of 120 become 128 long, the others 64; of the three a fourth makes two pairs."""
    assert padded_tokens(*text, 64) == 3 * 128 + 5 * 64
    assert padded_tokens(*text, 256) == 4 * 128 + 5 * 64 + 3 * 64


def test_an_error_ends_the_chunks_that_wait(tiny_llama: Path, text: tuple[Tensor, Tensor]) -> None:
    source = open_source(str(tiny_llama))
    model, read = LentModel(source), source.open_tensors().read

    def write(name: str, moments: Moments) -> Multiply:
        raise OSError("the disk is full")

    names = ["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(OSError, match="full"):
        run_side_by_side(model, *text, read, names, write, chunk_tokens=64, waiting_tokens=10**6)
    assert torch.isfinite(model.logits(text[0][:1], read)).all()


def test_products_in_bfloat16(tiny_llama: Path, text: tuple[Tensor, Tensor]) -> None:
    """Measured: 7e-3 of the moments' norm at most, the inputs of the last layers."""
    exact, rounded = through(tiny_llama, text, 64), through(tiny_llama, text, 64, torch.bfloat16)
    far = [
        float((one - other).norm() / one.norm())
        for name in exact
        for one, other in zip(*((of[name].own, of[name].cross) for of in (exact, rounded)), strict=True)
    ]
    assert 1e-4 < max(far) < 0.02
    assert all(torch.equal(moments.own, moments.own.T) for moments in rounded.values())


def test_layers_with_one_input_share_its_moments(tiny_llama: Path, text: tuple[Tensor, Tensor]) -> None:
    seen = through(tiny_llama, text, 64)
    layer = "model.layers.1.{}_proj.weight".format
    assert seen[layer("self_attn.q")] is seen[layer("self_attn.k")] is seen[layer("self_attn.v")]
    assert seen[layer("mlp.gate")] is seen[layer("mlp.up")]
    assert len({id(moments) for moments in seen.values()}) == 8


def test_the_moments_are_those_of_both_models(tiny_llama: Path, text: tuple[Tensor, Tensor]) -> None:
    """Against hooks on the whole model, with stored weights and with quantized ones."""
    from transformers import AutoModelForCausalLM

    seen = through(tiny_llama, text, 64)
    name = "model.layers.1.mlp.down_proj.weight"
    inputs = []
    for quantized in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        if quantized:
            for key, parameter in model.named_parameters():
                if "_proj" in key and key != name:
                    parameter.data = quantize(parameter.data).dequantize(torch.float32)
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        with torch.no_grad():
            model(input_ids=text[0])
    wanted, ours = (x[text[1]] for x in inputs)
    assert (seen[name].own - ours.T @ ours).norm() < 1e-4 * (ours.T @ ours).norm()
    assert (seen[name].cross - wanted.T @ ours).norm() < 1e-4 * (wanted.T @ ours).norm()
    assert (seen[name].cross - ours.T @ ours).norm() > 1e-2 * (ours.T @ ours).norm()


def test_a_layer_that_is_given_more_of_the_text_is_refused(tiny_llama: Path, text: tuple[Tensor, Tensor]) -> None:
    source = open_source(str(tiny_llama))
    model, read = LentModel(source), source.open_tensors().read

    def with_ids(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> object:
        return args, {**kwargs, "ids": args[0].mean()}

    model.decoder_layers()[0].register_forward_pre_hook(with_ids, with_kwargs=True)
    with pytest.raises(ModelError, match="cannot be run layer by layer"):
        run_side_by_side(model, *text, read, (), lambda name, moments: read, chunk_tokens=64)  # type: ignore[arg-type]
