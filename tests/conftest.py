"""A tiny Llama made in code, its tokenizer with a chat template, and a small chat file: what most tests need."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from halfbyte.config import LimitsConfig, hold_to

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 320

# What tests share asserts too: said in full, and also under python -O.
pytest.register_assert_rewrite("faults.refusals", "triton_cases", "fake_device", "random_adapters")
# Panels or tiles decide a product's last bits: the same on every machine, and nothing is timed in tests.
os.environ.setdefault("HALFBYTE_PANEL_ROWS", "never")
# What runs of tiny models measure must not reach the plans of whoever runs the tests.
_CACHE = tempfile.TemporaryDirectory(prefix="halfbyte-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["XDG_STATE_HOME"] = _CACHE.name  # nor runs of tests the list of theirs

MakeLlama = Callable[..., Path]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, intermediate_size=128, moe_intermediate_size=48, num_experts=8, head_dim=16, mlp_only_layers=[1]
    ),
    "olmoe": lambda: OlmoeConfig(**SIZES, intermediate_size=40, num_experts=4),
}
"""The second has a layer without experts."""


def _rows() -> list[dict[str, Any]]:
    """48 short dialogues of different lengths about letters and numbers; one in four has two turns."""
    rows = []
    for number in range(48):
        turns = [(f"What follows {number}?", f"After {number} comes {number + 1}.")]
        if number % 4 == 0:
            turns.append(("And then?", " ".join(str(number + 2 + i) for i in range(number % 12 + 1)) + "."))
        rows.append({
            "messages": [
                {"role": role, "content": content}
                for question, answer in turns
                for role, content in (("user", question), ("assistant", answer))
            ]
        })  # fmt: skip
    return rows


@pytest.fixture
def signals_of_a_terminal() -> Iterator[None]:
    """What a shell's foreground gives a process: under nohup or `&` SIGHUP and SIGINT are ignored, and stay so."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def default_limits() -> Iterator[None]:
    """For a test that sets other limits: the defaults come back after it."""
    yield
    hold_to(LimitsConfig())


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens with ChatML; <|im_end|> ends an answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in ("<pad>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([json.dumps(_rows())], trainer)
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    result.chat_template = CHATML
    return result


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> MakeLlama:
    """`make_llama(dtype=..., max_shard_size=..., **config)`: the folder of a tiny random Llama, made once each."""
    made: dict[str, Path] = {}

    def make(*, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "1GB", **config: Any) -> Path:
        key = repr((dtype, max_shard_size, sorted(config.items())))
        if key not in made:
            settings = {
                "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
                "tie_word_embeddings": False, "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": 2,
                "pad_token_id": 0,
            } | config  # fmt: skip
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("llama")
            model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            tiny_tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_mixture(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """`make_mixture(family)`: the folder of a tiny random mixture of experts in bf16, made once each."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            made[family] = tmp_path_factory.mktemp(family)
            model = AutoModelForCausalLM.from_config(MIXTURES[family]()).to(torch.bfloat16)
            model.save_pretrained(made[family])
            tiny_tokenizer.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_llama: MakeLlama) -> Path:
    """The folder of a tiny Llama in bf16: two layers of 64, untied head, with its tokenizer."""
    return make_llama()


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 dialogues as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows()[:40]))
    return path


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 other dialogues as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows()[40:]))
    return path
