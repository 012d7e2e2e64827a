"""Twenty seeded steps with every fusion on, beside transformers and PEFT with none of our operators in the model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from halfbyte.config import RunConfig
from halfbyte.data import Batch
from halfbyte.model.adapt import adapter_state
from halfbyte.nn import Linear4bit
from halfbyte.nn.experts import experts_of, layers_of
from halfbyte.optim import AdamW, clip_grad_norm, lora_param_groups
from halfbyte.train import Observer, train
from halfbyte.train.loop import _accumulate_gradients, _set_learning_rate
from halfbyte.train.setup import Run, prepare

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

STEPS = 20
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES, sliding_window=16),
}


class PlainObjective:
    """Each sequence by itself through transformers' own forward; full logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss_sums(self, batches: list[Batch]) -> list[Tensor]:
        return [self.loss_sum(batch) for batch in batches]

    def loss_sum(self, batch: Batch) -> Tensor:
        losses = []
        for start, stop in itertools.pairwise(batch.seq_starts.tolist()):
            logits = self.model(input_ids=batch.input_ids[:, start:stop], use_cache=False).logits[0, :-1]
            losses.append(F.cross_entropy(logits, batch.labels[0, start + 1 : stop], reduction="sum"))
        return torch.stack(losses).sum()


def plain(run: Run) -> Run:
    """`run` on the same decoded weights in nn.Linear, with PEFT's wrappers and the same adapter."""
    model = hf.AutoModelForCausalLM.from_pretrained(run.config.model.path, dtype=torch.float32)
    model.resize_token_embeddings(max(run.tokens.rows, SIZES["vocab_size"]))
    for name, module in run.loaded.model.named_modules():
        if layers_of(module):
            experts = model.get_submodule(name)
            for number, expert in enumerate(experts_of(module)):
                *first, down = (expert.get_submodule(layer).dequantize(torch.float32) for layer in layers_of(module))
                experts.gate_up_proj.data[number], experts.down_proj.data[number] = torch.cat(first), down
        elif isinstance(module, Linear4bit) and ".experts." not in name:
            layer = model.get_submodule(name.replace(".base_layer", ""))
            layer.weight.data.copy_(module.dequantize(torch.float32))
    adapted = peft.get_peft_model(model, run.model.peft_config["default"]).train()
    result = peft.set_peft_model_state_dict(adapted, adapter_state(run.model))
    assert not result.unexpected_keys
    assert not any(type(module).__module__.startswith("halfbyte") for module in adapted.modules())
    optim = run.config.optim
    groups = lora_param_groups(adapted.named_parameters(), optim.lr, optim.lr_b_ratio, optim.weight_decay)
    optimizer = AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    return replace(run, model=adapted, objective=PlainObjective(adapted), optimizer=optimizer)


def losses_of(run: Run) -> list[float]:
    """The loop without what is around it."""
    cursor, losses = run.loader.start(), []
    for step in range(1, STEPS + 1):
        batch, cursor = run.loader.next_batch(cursor)
        losses.append(_accumulate_gradients(run, [batch], batch.num_targets))
        clip_grad_norm(run.model.parameters(), run.config.optim.max_grad_norm)
        _set_learning_rate(run, step)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return losses


TOKENS = {"lora__trainable_tokens": ["<|tool|>", "<|im_end|>", "<|call|>"]}
WHOLE = {"lora__modules_to_save": ["lm_head", "embed_tokens"]}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}), ("llama", {"train__gradient_checkpointing": True}), ("gemma3", {}),
        ("qwen3", {"train__gradient_checkpointing": True}), ("llama", TOKENS), ("gemma3", TOKENS), ("llama", WHOLE),
        ("gemma3", WHOLE), ("llama", {**TOKENS, "lora__modules_to_save": ["lm_head"]}), ("qwen3", {**TOKENS, **WHOLE}),
        ("mixtral", {}), ("qwen3_moe", {"train__gradient_checkpointing": True}), ("olmoe", {}), ("qwen3_moe", TOKENS),
    ],
)  # fmt: skip
def test_twenty_steps_are_those_of_the_plain_path(
    family: str, settings: dict[str, Any], make_run: Callable[..., RunConfig], make_mixture: Callable[[str], Path],
    tmp_path: Path, tiny_tokenizer: Any, tool_file: Path,
) -> None:  # fmt: skip
    """To 1e-5 of losses from 6 down to 4, in float32; measured 1e-6, two units in the last place of a loss."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    if family in FAMILIES:
        hf.AutoModelForCausalLM.from_config(FAMILIES[family]()).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    else:
        folder = make_mixture(family)
    config = make_run(model__path=str(folder), train__steps=STEPS, data__train=str(tool_file), **settings)
    run = prepare(config, Observer())
    assert run.objective.fused == (family in FAMILIES)
    expected = losses_of(plain(run))
    train(config)
    lines = [json.loads(line) for line in (Path(config.train.output) / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if line["event"] == "step"]
    assert len(found) == STEPS
    assert expected[-1] < 0.95 * expected[0]  # it learns, so that a wrong gradient would show
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-5
