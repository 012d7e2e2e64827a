"""Text from a loaded model, with or without an adapter: natively where `Decoder` covers it, else by transformers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from halfbyte.errors import ConfigError
from halfbyte.model.decode import Decoder
from halfbyte.model.decoder_parts import NotCoveredError

NATIVE = "native"
MOST_IN_TURN = 8
"""More prompts than these are faster as one batch of transformers' than natively one after the other."""
PLAIN_SETTINGS = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "max_length",
    "max_new_tokens", "use_cache", "do_sample", "temperature", "top_k", "top_p",
})  # fmt: skip
"""Generation settings of a model that change nothing here; others (penalties, forced tokens) do."""


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


@dataclass(frozen=True)
class Generated:
    """One answer.

    Attributes:
        ids: the new tokens, without the end token.
        steps: tokens computed, the end token included.
        prompt_seconds: from the start to the first token.
        seconds: from the first token to the last.
        engine: "native", or why transformers generated.
    """

    ids: list[int]
    steps: int
    prompt_tokens: int
    prompt_seconds: float
    seconds: float
    engine: str

    @property
    def tokens_per_s(self) -> float:
        """After the first token, which comes with the prompt."""
        return (self.steps - 1) / self.seconds if self.steps > 1 else self.steps / self.prompt_seconds

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prompt_seconds


def generate_ids(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], **options: Any
) -> list[list[int]]:
    """The new tokens after each prompt, without the end token. Options as for `generate`."""
    return [answer.ids for answer in generate(model, tokenizer, prompts, **options)]


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> list[Generated]:
    """An answer to each prompt.

    Args:
        temperature: 0 takes the likeliest token each time.
        on_token: called with each new token, the end token included; for one prompt only.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"{max_new_tokens} new tokens", where="--max-new-tokens", fix="Ask for at least 1")
    if temperature < 0:
        raise ConfigError(f"{temperature} is not possible", where="--temperature", fix="Give 0 or more")
    stops = stop_ids(model, tokenizer)
    model.eval()
    try:
        decoder = _decoder(model, prompts)
        torch.manual_seed(seed)
        return [_answer(decoder, p, stops, max_new_tokens, temperature, on_token) for p in prompts]
    except NotCoveredError as error:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
        config = _generation_config(max_new_tokens, temperature, stops, pad)
        torch.manual_seed(seed)
        return _through_transformers(model, prompts, config, stops, on_token, str(error))


def _decoder(model: Any, prompts: list[list[int]]) -> Decoder:
    """The native path, tried out on the first prompt. Raises NotCoveredError."""
    if len(prompts) > MOST_IN_TURN:
        raise NotCoveredError(f"{len(prompts)} prompts at once")
    changed = {name for name, value in model.generation_config.to_diff_dict().items() if value} - PLAIN_SETTINGS
    if changed:
        raise NotCoveredError(f"the model's generation settings have {', '.join(sorted(changed))}")
    decoder = Decoder(model)
    decoder.try_out(prompts[0])
    return decoder


def _answer(
    decoder: Decoder, prompt: list[int], stops: list[int], max_new_tokens: int, temperature: float,
    on_token: Callable[[int], None] | None,
) -> Generated:  # fmt: skip
    started = time.perf_counter()
    logits, ids = decoder.prefill(prompt), list[int]()
    first = started
    while True:
        ids.append(_choose(logits, temperature))
        if len(ids) == 1:
            first = time.perf_counter()
        if on_token:
            on_token(ids[-1])
        if ids[-1] in stops or len(ids) == max_new_tokens:
            break
        logits = decoder.step(ids[-1])
    seconds = time.perf_counter() - first
    return Generated(_until_stop(ids, stops), len(ids), len(prompt), first - started, seconds, NATIVE)


def _choose(logits: torch.Tensor, temperature: float) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, 0), 1))


def _generation_config(max_new_tokens: int, temperature: float, stops: list[int], pad: int) -> GenerationConfig:
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=stops or None, use_cache=True, **options
    )


def _through_transformers(
    model: Any, prompts: list[list[int]], config: GenerationConfig, stops: list[int],
    on_token: Callable[[int], None] | None, reason: str,
) -> list[Generated]:  # fmt: skip
    pad, longest = config.pad_token_id, max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    device = next(model.parameters()).device
    streamer = _Streamer(on_token) if len(prompts) == 1 else None
    started = time.perf_counter()
    output = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, streamer=streamer
    )
    ended = time.perf_counter()
    first = (streamer and streamer.first) or ended
    rows = [row[longest:].tolist() for row in output]
    return [
        Generated(_until_stop(row, stops), len(row), len(prompt), first - started, ended - first, reason)
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Hands new tokens on and notes when the first came; transformers sends the prompt first."""

    def __init__(self, on_token: Callable[[int], None] | None) -> None:
        self._on_token = on_token
        self._prompt_seen = False
        self.first = 0.0

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.first = self.first or time.perf_counter()
            if self._on_token:
                self._on_token(int(value.reshape(-1)[0]))
        self._prompt_seen = True

    def end(self) -> None:
        pass
