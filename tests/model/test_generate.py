"""Generation: where an answer starts and ends, batches of different lengths, and the same words for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from halfbyte.config import QuantConfig
from halfbyte.errors import ConfigError, ModelError
from halfbyte.model.compute_dtype import choose_compute_dtype
from halfbyte.model.generate import generate, generate_ids, prompt_ids, stop_ids
from halfbyte.model.load import load_model
from halfbyte.model.source import load_tokenizer

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40], [100, 101, 102]]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_model(str(tiny_llama), QuantConfig(), compute_dtype=torch.float32).model


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(str(tiny_llama))


@pytest.fixture
def stop_token(model: Any, tokenizer: Any) -> Iterator[int]:
    """A token that the greedy answer to the first prompt holds, made an end token of the model."""
    ids = generate_ids(model, tokenizer, PROMPTS[:1], max_new_tokens=8)[0]
    before, model.config.eos_token_id = model.config.eos_token_id, [2, ids[4]]
    yield ids[4]
    model.config.eos_token_id = before


def test_prompts_end_where_the_assistant_speaks(tokenizer: Any) -> None:
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "Hello"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = None
    assert tokenizer.decode(prompt_ids(tokenizer, [{"role": "user", "content": "Hello"}])) == "Hello"


def test_greedy_is_the_likeliest_token_each_time(model: Any, tokenizer: Any) -> None:
    (found,) = generate_ids(model, tokenizer, PROMPTS[:1], max_new_tokens=6)
    ids = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert found == ids[len(PROMPTS[0]) :]


def test_one_prompt_is_answered_natively_and_as_transformers_does(make_llama: Any, tokenizer: Any) -> None:
    folder = make_llama(intermediate_size=128)  # rows of whole blocks
    model: Any = load_model(str(folder), QuantConfig(), compute_dtype=torch.float32).model
    (answer,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=40)
    assert answer.engine == "native"
    assert answer.tokens_per_s > 0
    model.generation_config.repetition_penalty = 1.0001  # something that only transformers does, hardly felt
    (theirs,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=40)
    assert theirs.engine == "the model's generation settings have repetition_penalty"
    assert theirs.ids == answer.ids


def test_batches_change_nothing(model: Any, tokenizer: Any) -> None:
    together = generate_ids(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert together == [generate_ids(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]


def test_an_answer_ends_before_its_end_token(model: Any, tokenizer: Any, stop_token: int) -> None:
    assert stop_ids(model, tokenizer) == sorted({2, stop_token})
    found = generate_ids(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert len(found[0]) <= 4
    assert all(stop_token not in ids for ids in found)


def test_sampling_depends_on_the_seed_alone(model: Any, tokenizer: Any) -> None:
    answers = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        answers.append(generate_ids(model, tokenizer, PROMPTS[:1], max_new_tokens=12, temperature=1.5, seed=seed))
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_tokens_are_told_as_they_come(model: Any, tokenizer: Any) -> None:
    seen: list[int] = []
    (found,) = generate_ids(model, tokenizer, PROMPTS[:1], max_new_tokens=5, on_token=seen.append)
    assert seen == found


def test_bad_requests(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"--max-new-tokens: 0 new tokens\. Ask for at least 1"):
        generate_ids(model, tokenizer, PROMPTS, max_new_tokens=0)
    with pytest.raises(ConfigError, match="--temperature: -1 is not possible"):
        generate_ids(model, tokenizer, PROMPTS, max_new_tokens=1, temperature=-1)


def test_a_folder_without_a_tokenizer(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tiny_llama)).chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template


def test_compute_dtype_is_the_hardwares(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule over features, not a timing: the same on every run; and the reason is a sentence."""
    for features, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16), ({"bf16": True}, torch.float32), ({"avx2": True}, torch.float32),
        ({}, torch.float32),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        found, reason = choose_compute_dtype("auto")
        assert found == dtype
        assert "bfloat16" in reason
        for setting in ("float32", "bfloat16", "float16"):
            found, reason = choose_compute_dtype(setting)
            assert found == getattr(torch, setting)
            assert reason.startswith("as set")
    assert "slow here" in choose_compute_dtype("bfloat16")[1]
