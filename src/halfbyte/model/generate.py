"""Text from a loaded model, with or without an adapter, through transformers' generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from halfbyte.errors import ConfigError


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks; the bare text if there is no chat template."""
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return list(ids)
    return list(tokenizer(messages[-1]["content"]).input_ids)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's and the model's end tokens."""
    ids = [tokenizer.eos_token_id]
    configured = getattr(model.config, "eos_token_id", None)
    ids += configured if isinstance(configured, list) else [configured]
    return sorted({i for i in ids if i is not None})


@torch.no_grad()
def generate_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The new tokens after each prompt, without the end token.

    Args:
        temperature: 0 takes the likeliest token each time.
        on_token: called with each new token; for one prompt only.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"{max_new_tokens} new tokens", where="--max-new-tokens", fix="Ask for at least 1")
    if temperature < 0:
        raise ConfigError(f"{temperature} is not possible", where="--temperature", fix="Give 0 or more")
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=stops or None, use_cache=True, **options
    )
    streamer = _Streamer(on_token) if on_token else None
    torch.manual_seed(seed)
    model.eval()
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)
    return [_until_stop(row[longest:].tolist(), stops) for row in output]


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Hands new tokens on; transformers sends the prompt first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._on_token(int(value.reshape(-1)[0]))
        self._prompt_seen = True

    def end(self) -> None:
        pass
