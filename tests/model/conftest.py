"""Tiny random transformers models of many architectures, saved as folders, and what feeds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

VOCAB = 128
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER: dict[str, Any] = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 64}
TEXT_END = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Case:
    """One architecture: how it is made, loaded and fed."""

    name: str
    config: Callable[[], hf.PreTrainedConfig]
    model: str
    auto: str
    task: str | None = "CAUSAL_LM"

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(3, VOCAB, (2, 12), generator=generator)
        if self.auto == "AutoModelForImageClassification":
            pixels = torch.randn(2, 3, 16, 16, generator=generator)
            return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
        if self.auto == "AutoModelForSequenceClassification":
            return {"input_ids": ids, "labels": torch.tensor([0, 1])}
        return {"input_ids": ids, "labels": ids}

    def load(self, folder: Path, **kwargs: Any) -> Any:
        return getattr(hf, self.auto).from_pretrained(folder, **kwargs)


def _causal(name: str, config: type[hf.PreTrainedConfig], model: str, **kwargs: Any) -> Case:
    return Case(name, lambda: config(**kwargs, **TEXT_END), model, "AutoModelForCausalLM")


CASES = [
    _causal("llama", hf.LlamaConfig, "LlamaForCausalLM", **DECODER, tie_word_embeddings=False),
    _causal("qwen2", hf.Qwen2Config, "Qwen2ForCausalLM", **DECODER, tie_word_embeddings=True),
    _causal("qwen3", hf.Qwen3Config, "Qwen3ForCausalLM", **DECODER, head_dim=16, tie_word_embeddings=False),
    _causal("mistral", hf.MistralConfig, "MistralForCausalLM", **DECODER, head_dim=16),
    _causal("gemma3", hf.Gemma3TextConfig, "Gemma3ForCausalLM", **DECODER, head_dim=16, sliding_window=8),
    _causal(
        "phi", hf.PhiConfig, "PhiForCausalLM",
        **DECODER | {"num_key_value_heads": 4}, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0,
    ),
    _causal(
        "gpt2", hf.GPT2Config, "GPT2LMHeadModel", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    Case(
        "bert", lambda: hf.BertConfig(**SIZES, intermediate_size=128, max_position_embeddings=64, **CALM),
        "BertForSequenceClassification", "AutoModelForSequenceClassification", "SEQ_CLS",
    ),
    Case(
        "vit",
        lambda: hf.ViTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=16,
            patch_size=8, **CALM,
        ),
        "ViTForImageClassification", "AutoModelForImageClassification", None,
    ),
    Case(
        "t5",
        lambda: hf.T5Config(
            vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """A tiny model on disk."""

    case: Case
    folder: Path

    def load(self, **kwargs: Any) -> Any:
        return self.case.load(self.folder, **kwargs)

    def batch(self) -> dict[str, Tensor]:
        return self.case.batch()


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """`save_tiny(name)`: the architecture's folder, made once."""
    made: dict[str, Saved] = {}

    def save(name: str) -> Saved:
        if name not in made:
            case = next(case for case in CASES if case.name == name)
            torch.manual_seed(0)
            model = getattr(hf, case.model)(case.config())
            with torch.no_grad():  # tiny initial weights would make every logit alike
                for parameter in model.parameters():
                    if parameter.ndim == 2 and parameter.std() < 0.05:
                        parameter.mul_(4)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = Saved(case, folder)
        return made[name]

    return save


@pytest.fixture(params=[case.name for case in CASES])
def tiny(request: pytest.FixtureRequest, save_tiny: Callable[[str], Saved]) -> Saved:
    """Every architecture in turn."""
    return save_tiny(request.param)


@pytest.fixture
def llama(save_tiny: Callable[[str], Saved]) -> Saved:
    return save_tiny("llama")
