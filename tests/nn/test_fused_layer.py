"""A decoder layer as one function is the layer that transformers wrote, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from halfbyte.nn import Linear4bit
from halfbyte.nn.fused_layer import FusedLayer, fuse_layers, unfuse_layers
from halfbyte.nn.packed_attention import enable_packed_attention

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "llama with biases": lambda: hf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral": lambda: hf.MistralConfig(**SMALL, head_dim=16, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**SMALL),
    "qwen3": lambda: hf.Qwen3Config(**SMALL, head_dim=32),
    "gemma": lambda: hf.GemmaConfig(**SMALL, head_dim=16),
    "gemma3": lambda: hf.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=5),
    "phi3": lambda: hf.Phi3Config(**SMALL, sliding_window=5, partial_rotary_factor=0.5),
}
LENGTHS = (7, 1, 12)
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def adapted(family: str, dtype: torch.dtype = torch.float32, **lora: Any) -> peft.PeftModel:
    """A tiny model in 4 bits whose adapters do something, in training mode."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
        parameter.requires_grad_(False)
    model.to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            layer = Linear4bit.from_weight(module.weight.data, module.bias, compute_dtype=dtype)
            model.set_submodule(name, layer)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    result = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in result.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return result.train()


def pass_through(model: peft.PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of a pack, and the gradients of a random function of them."""
    base = model.get_base_model()
    generator = torch.Generator().manual_seed(1)
    total = sum(LENGTHS)
    ids = torch.randint(0, 100, (1, total), generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    model.zero_grad()
    with enable_packed_attention(base):
        hidden = base.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, seq_starts=starts
        ).last_hidden_state
    (hidden.float() * torch.randn(hidden.shape, generator=generator)).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative distance of two tensors of the same name."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_are_those_of_the_plain_layers(family: str, dora: bool) -> None:
    """Measured: at most 4e-7 of the norm for hidden states, 1.4e-6 for gradients."""
    model = adapted(family, use_dora=dora)
    hidden, gradients = pass_through(model)
    assert len(gradients) == (3 if dora else 2) * sum(isinstance(m, Linear4bit) for m in model.modules())
    names = list(model.state_dict())
    assert fuse_layers(model) == 2
    assert list(model.state_dict()) == names
    fused_hidden, fused_gradients = pass_through(model)
    assert distance({"": fused_hidden}, {"": hidden}) < 2e-6
    assert distance(fused_gradients, gradients) < 1e-5
    unfuse_layers(model)
    assert not any(isinstance(m, FusedLayer) for m in model.modules())
    again, _ = pass_through(model)
    assert torch.equal(again, hidden)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_gradient_checkpointing_changes_nothing(family: str, dora: bool) -> None:
    model = adapted(family, use_dora=dora)
    fuse_layers(model)
    hidden, gradients = pass_through(model)
    model.get_base_model().gradient_checkpointing_enable()
    checkpointed, recomputed = pass_through(model)
    assert torch.equal(hidden, checkpointed)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_the_plain_layers(dtype: torch.dtype, dora: bool) -> None:
    exact, exact_gradients = pass_through(adapted("llama", use_dora=dora))
    model = adapted("llama", dtype, use_dora=dora)
    plain, plain_gradients = pass_through(model)
    fuse_layers(model)
    fused, fused_gradients = pass_through(model)
    assert distance({"": fused.float()}, {"": exact}) < 1.3 * distance({"": plain.float()}, {"": exact})
    assert distance(fused_gradients, exact_gradients) < 1.5 * distance(plain_gradients, exact_gradients)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_weight_and_no_norm_is_saved(checkpointing: bool) -> None:
    """What one layer keeps for the backward, in floats a token: x, q k v, attention and its sums, h, gate and up."""
    model = adapted("llama", r=4)
    fuse_layers(model)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    layer = model.get_base_model().base_model.layers[0]
    x = torch.randn(1, 20, 64, requires_grad=True)
    rotary = model.get_base_model().base_model.rotary_emb(x, torch.arange(20)[None])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, position_embeddings=rotary, seq_starts=[0, 20])
    parameters = {p.data_ptr() for p in model.parameters()}
    floats = sum(t.numel() for t in kept if t.data_ptr() not in parameters)
    ranks, sums = 7 * 4, 4 + 2  # of the adapters; log-sum-exp by head, and the two norms
    all_of_it = 64 + 128 + 64 + 64 + 2 * 96 + ranks + sums
    assert floats == 20 * (64 + 4 if checkpointing else all_of_it)


def test_what_is_not_plain_goes_to_the_plain_layer() -> None:
    model = adapted("llama")
    reference = copy.deepcopy(model)
    fuse_layers(model)
    ids = torch.randint(0, 100, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    for inputs in (
        {"attention_mask": mask}, {"output_hidden_states": True}, {"use_cache": True}, {},
    ):  # fmt: skip
        expected = reference(input_ids=ids, **inputs)
        result = model(input_ids=ids, **inputs)
        kept = mask.bool() if "attention_mask" in inputs else slice(None)
        torch.testing.assert_close(result.logits[kept], expected.logits[kept], rtol=1e-4, atol=1e-4)
        if "output_hidden_states" in inputs:
            assert len(result.hidden_states) == len(expected.hidden_states)
    cached, expected = model(input_ids=ids), reference(input_ids=ids)
    step = torch.randint(0, 100, (2, 1))
    torch.testing.assert_close(
        model(input_ids=step, past_key_values=cached.past_key_values).logits,
        reference(input_ids=step, past_key_values=expected.past_key_values).logits, rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    with model.disable_adapter(), reference.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_what_is_not_covered_is_not_fused() -> None:
    assert fuse_layers(adapted("llama", lora_dropout=0.1)) == 0
    assert fuse_layers(hf.AutoModelForCausalLM.from_config(FAMILIES["llama"]())) == 0, "unquantized"
    hooked = adapted("llama")
    hooked.get_base_model().base_model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert fuse_layers(hooked) == 1
    some = adapted("llama", target_modules=["q_proj", "down_proj"])
    hidden, gradients = pass_through(some)
    assert fuse_layers(some) == 2, "layers without adapter are covered too"
    fused_hidden, fused_gradients = pass_through(some)
    assert distance({"": fused_hidden}, {"": hidden}) < 2e-6
    assert distance(fused_gradients, gradients) < 1e-5


def test_an_adapter_attached_after_fusing_is_seen() -> None:
    model = adapted("llama")
    base = model.unload()
    fuse_layers(base)
    torch.manual_seed(0)
    again = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    _, gradients = pass_through(again)
    assert len(gradients) == 28


def test_a_changed_adapter_before_the_backward_is_an_error() -> None:
    model = adapted("llama")
    fuse_layers(model)
    loss = model(input_ids=torch.arange(9)[None]).logits.sum()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_is_its_own() -> None:
    model = adapted("llama")
    fuse_layers(model)
    other = copy.deepcopy(model)
    hidden, _ = pass_through(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    again, _ = pass_through(other)
    assert torch.equal(again, hidden)


def test_an_adapter_that_is_not_float32_and_a_trained_bias_are_not_fused() -> None:
    """Their arithmetic is PEFT's."""
    half = adapted("llama")
    half.get_base_model().base_model.layers[0].mlp.up_proj.lora_A.half()
    assert fuse_layers(half) == 1
    biased = adapted("llama with biases")
    biased.get_base_model().base_model.layers[1].self_attn.o_proj.base_layer.bias.requires_grad_(True)
    assert fuse_layers(biased) == 1


def test_micro_batches_whose_sequences_go_on_from_others() -> None:
    """Each goes through the layer as in a call of its own."""
    model = adapted("llama")
    fuse_layers(model)
    base = model.get_base_model().base_model
    layer, rotary = base.layers[0], base.rotary_emb
    x = torch.randn(1, 23, 64)
    positions = torch.tensor([[*range(4), *range(4, 9), *range(4, 7), *range(6), *range(2), *range(2, 5)]])
    angles = rotary(x, positions)
    together = layer(
        x, position_embeddings=angles, seq_starts=[0, 4, 9, 12, 18, 20, 23], parents=[-1, 0, 0, -1, -1, 4],
        micro_batches=[0, 12, 23],
    )  # fmt: skip
    cases = ((0, 12, [0, 4, 9, 12], [-1, 0, 0]), (12, 23, [0, 6, 8, 11], [-1, -1, 1]))
    for start, stop, starts, parents in cases:
        cos, sin = (angle[:, start:stop] for angle in angles)
        alone = layer(x[:, start:stop], position_embeddings=(cos, sin), seq_starts=starts, parents=parents)
        assert torch.equal(alone, together[:, start:stop])
