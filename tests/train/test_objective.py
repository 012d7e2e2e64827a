"""The loss of sequences laid end to end is the sum of each one's own, in whatever architecture."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from halfbyte.data import Batch
from halfbyte.nn import Linear4bit
from halfbyte.nn.packed_attention import NAME
from halfbyte.train.objective import MASKED, PACKED, PADDED, Objective

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOW = GROUPED | {"head_dim": 8, "sliding_window": 4}
CALM = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

CASES: dict[str, tuple[Callable[[], hf.PreTrainedConfig], str, bool]] = {
    # name: (config, layout, whether the loss is taken in chunks)
    "llama": (lambda: hf.LlamaConfig(**GROUPED), PACKED, True),
    "qwen2 sliding": (
        lambda: hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=0),
        PACKED, True,
    ),
    "qwen3": (lambda: hf.Qwen3Config(**GROUPED, head_dim=8), PACKED, True),
    "mistral": (lambda: hf.MistralConfig(**WINDOW), PACKED, True),
    "phi3": (lambda: hf.Phi3Config(**GROUPED, sliding_window=4), PACKED, True),
    "gpt2": (
        lambda: hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **CALM), PACKED, True,
    ),
    "gemma3": (lambda: hf.Gemma3TextConfig(**WINDOW, query_pre_attn_scalar=8), PACKED, True),
    # Logits or attention scores are capped, scaled ...
    "gemma2": (
        lambda: hf.Gemma2Config(
            **WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=1.0, final_logit_softcapping=2.0
        ), MASKED, False,
    ),
    "granite": (lambda: hf.GraniteConfig(**GROUPED, logits_scaling=4.0), PACKED, False),
    # ... or the layers do not hand on what tells sequences apart, though nothing in their configs says so.
    "gpt-j": (
        lambda: hf.GPTJConfig(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, **CALM
        ), MASKED, True,
    ),
    "nemotron": (lambda: hf.NemotronConfig(**GROUPED, head_dim=8), MASKED, True),
    "bloom": (lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), PADDED, True),
    "falcon": (lambda: hf.FalconConfig(**SIZES), PADDED, True),
    "gpt-oss": (
        lambda: hf.GptOssConfig(**WINDOW, num_local_experts=2, num_experts_per_tok=1), PADDED, True,
    ),
    "lfm2": (
        lambda: hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_multiple_of=16), PADDED, True,
    ),
    "mamba": (
        lambda: hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4), PADDED, True,
    ),
}  # fmt: skip


def batch_of(lengths: list[int], seed: int = 0) -> Batch:
    """Random sequences end to end; a third of the tokens are not targets."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(3, VOCAB, (1, total), generator=generator)
    starts = [0, *itertools.accumulate(lengths)]
    labels = torch.where(torch.rand(1, total, generator=generator) < 0.3, -100, ids)
    labels[0, starts[:-1]] = -100
    return Batch(
        input_ids=ids, labels=labels, position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        seq_starts=torch.tensor(starts, dtype=torch.int32), num_targets=int((labels != -100).sum()), num_tokens=total,
    )  # fmt: skip


def loss_of_each_alone(model: nn.Module, batch: Batch) -> Tensor:
    """transformers' forward on one sequence at a time, full logits."""
    losses = []
    for start, stop in itertools.pairwise(batch.seq_starts.tolist()):
        logits = model(input_ids=batch.input_ids[:, start:stop], use_cache=False).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, batch.labels[0, start + 1 : stop], reduction="sum"))
    return torch.stack(losses).sum()


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CASES[name][0]()).to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_packed_equals_alone(name: str) -> None:
    """Loss and gradients, to fp32 rounding: measured at most 1.7e-7 and 2e-6 of the largest gradient."""
    model = tiny(name).eval()
    attention = model.config._attn_implementation
    objective = Objective(model)
    _, layout, chunks = CASES[name]
    assert objective.layout == layout
    assert ("chunks" in objective.decisions[1]) is chunks
    batch = batch_of([7, 9, 2, 14])
    # The input embedding stands for everything below the output layer, which is frozen in training.
    embedding = model.get_input_embeddings().weight
    model.get_output_embeddings().requires_grad_(False)
    embedding.requires_grad_()
    expected = loss_of_each_alone(model, batch)
    (expected_grad,) = torch.autograd.grad(expected, embedding)
    with objective.ready():
        found = objective.loss_sum(batch)
        (grad,) = torch.autograd.grad(found, embedding)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    if model.get_output_embeddings().weight is embedding:  # tied: what flows through the head is left out on our side
        expected_grad = grad
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-5 * float(expected_grad.abs().max()))
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2"])
def test_sixteen_bits(name: str) -> None:
    """The same choices in bf16, where every comparison is rough."""
    objective = Objective(tiny(name, torch.bfloat16))
    assert objective.layout == CASES[name][1]
    assert ("chunks" in objective.decisions[1]) is CASES[name][2]


def test_dropout_does_not_disturb_the_trial() -> None:
    """A model in training mode, whose passes differ, is tried in eval mode and left as it was."""
    config = CASES["llama"][0]()
    config.attention_dropout = 0.5
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).train()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.register_forward_hook(lambda module, _, out: F.dropout(out, 0.5, module.training))
    before = torch.random.get_rng_state()
    objective = Objective(model)
    assert objective.layout == PACKED
    assert "chunks" in objective.decisions[1]
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_packed_attention_only_inside_the_block() -> None:
    model = tiny("llama").eval()
    objective = Objective(model)
    assert model.config._attn_implementation != NAME
    with objective.ready():
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation != NAME


def test_decisions_are_said() -> None:
    for name, said in (("llama", "each sequence by itself"), ("gemma2", "block-diagonal"), ("lfm2", "padded row")):
        assert said in Objective(tiny(name)).decisions[0]
    assert "over all logits" in Objective(tiny("gemma2")).decisions[1]


@pytest.mark.parametrize(("name", "said"), [("llama", "run as one function"), ("granite", "another result")])
def test_layers_are_fused_only_where_that_gives_the_same(name: str, said: str) -> None:
    """Granite's layers have the modules of Llama's, and scale what they add."""
    config = CASES[name][0]()
    if name == "granite":
        config.residual_multiplier = 0.5
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            model.set_submodule(path, Linear4bit.from_weight(module.weight.data))
    objective = Objective(model.requires_grad_(False))
    assert said in objective.decisions[2]
    batch = batch_of([7, 9, 2, 14])
    with torch.no_grad():
        expected = loss_of_each_alone(model, batch)
        with objective.ready():
            torch.testing.assert_close(objective.loss_sum(batch), expected, rtol=1e-5, atol=1e-5)
    assert not any(type(module).__name__ == "FusedLayer" for module in model.modules())


def test_unquantized_layers_are_not_fused() -> None:
    assert "know no such modules" in Objective(tiny("llama")).decisions[2]


def quantized(config: hf.PreTrainedConfig, **lora: Any) -> peft.PeftModel:
    """A tiny model in 4 bits with adapters that do something, in training mode."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            model.set_submodule(path, Linear4bit.from_weight(module.weight.data, module.bias))
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False} | lora
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


def chat_batch(lengths: list[int], shared: int) -> Batch:
    """Samples of which the first `shared` tokens are alike and the last few but one are targets."""
    batch = batch_of(lengths)
    for start, stop in itertools.pairwise(batch.seq_starts.tolist()):
        batch.input_ids[0, start : start + shared] = torch.arange(3, 3 + shared)
        batch.labels[0, start:stop] = -100
        batch.labels[0, max(start + shared + 1, stop - 4) : stop - 1] = 5
    return replace(batch, num_targets=int((batch.labels != -100).sum()))


def gradients_of(model: peft.PeftModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_samples_that_share_their_beginning(name: str, checkpointing: bool) -> None:
    """Loss and every gradient are those of each sample alone, sliding windows of 4 tokens included.

    Measured: at most 8e-8 of the loss and 1.5e-6 of a gradient's norm, fusing included.
    """
    model = quantized(CASES[name][0]())
    base = model.get_base_model()
    batch = chat_batch([20, 14, 17, 13, 30], shared=11)
    expected = loss_of_each_alone(base, batch)
    expected_gradients = gradients_of(model, expected)
    if checkpointing:
        base.gradient_checkpointing_enable()
    objective = Objective(base)
    assert "computed once" in objective.decisions[3]
    with objective.ready():
        loss = objective.loss_sum(batch)
        gradients = gradients_of(model, loss)
        with torch.no_grad():
            assert torch.equal(objective.loss_sum(batch), loss)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    far = {n: float((gradients[n] - g).norm() / g.norm()) for n, g in expected_gradients.items()}
    assert max(far.values()) < 5e-6, max(far, key=far.__getitem__)


def test_samples_share_nothing_where_dropout_would_be_shared_too() -> None:
    """Layer 1 has no adapter and is fused; layer 0 has dropout and is not."""
    for dropout, said in ((0.1, "only fused layers"), (0.0, "computed once")):
        model = quantized(CASES["llama"][0](), lora_dropout=dropout, target_modules=["layers.0.mlp.up_proj"])
        objective = Objective(model.get_base_model())
        assert "run as one function" in objective.decisions[2]
        assert said in objective.decisions[3]


def test_batches_computed_together_are_those_computed_alone() -> None:
    """To the bit, losses and gradients: one shares beginnings, the other nothing."""
    model = quantized(CASES["llama"][0]())
    objective = Objective(model.get_base_model())
    batches = [chat_batch([20, 14, 17], shared=11), batch_of([9, 6]), chat_batch([13, 30], shared=8)]
    with objective.ready():
        together = objective.loss_sums(batches)
        gradients = gradients_of(model, sum(together))
        model.zero_grad()
        for batch, loss in zip(batches, together, strict=True):
            alone = objective.loss_sum(batch)
            assert torch.equal(alone, loss)
            alone.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(gradients[name], parameter.grad), name
