"""From logits to a token. A row is looked at by itself, so that the other rows of a batch change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

SORTED = (256, 4096, 1 << 31)
"""Candidates that top-p looks at: sorting a whole vocabulary takes milliseconds."""


class DeadEndError(Exception):
    """No token may follow, or it cannot be told which."""


class Form(Protocol):
    """What an answer must look like."""

    def allowed(self) -> Tensor:
        """(tokens,) bool: those that may come next. Raises DeadEndError."""

    def took(self, token: int) -> None:
        """`token` is part of the answer now."""


MakeForm = Callable[[], Form]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The defaults take the likeliest each time.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: candidates, the likeliest ones; 0 for all.
        top_p: the likeliest candidates up to this probability together, at least one.
        min_p: candidates of at least this part of the likeliest one's probability.
        presence_penalty, frequency_penalty: taken from the logits of tokens of the answer so far, once and per time.
        repetition_penalty: divides positive logits of tokens of prompt and answer, multiplies negative ones.
        bias: added to logits, by token.
        seed: the same one gives the same answer to the same request.
        form: of the answer, made anew for each.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    form: MakeForm | None = None

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the logits as they are is the answer."""
        return self.temperature == 0 and not self.changes_logits and self.form is None

    @property
    def changes_logits(self) -> bool:
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties) or bool(self.bias)


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._random = torch.Generator().manual_seed(sampling.seed)
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._form = sampling.form() if sampling.form else None

    def took(self, token: int) -> None:
        """`token` is part of the answer now."""
        if self.sampling.changes_logits:
            self._counts[token] += 1
            self._seen.add(token)
        if self._form:
            self._form.took(token)

    def choose(self, logits: Tensor) -> int:
        """A token by logits (vocab_size,) float32. Raises DeadEndError where the form leaves none."""
        s = self.sampling
        if s.changes_logits:
            logits = self._changed(logits)
        if self._form:
            logits = _only(logits, self._form.allowed())
        if s.temperature == 0:
            return int(logits.argmax())
        candidates, weights = self._candidates(torch.softmax(logits.double() / s.temperature, 0))
        total = weights.cumsum(0)
        at = torch.rand(1, generator=self._random, dtype=torch.float64) * total[-1]
        return int(candidates[min(int(torch.searchsorted(total, at, right=True)), len(candidates) - 1)])

    def _changed(self, logits: Tensor) -> Tensor:
        s, logits = self.sampling, logits.clone()
        if s.repetition_penalty != 1 and self._seen:
            seen = torch.tensor(sorted(self._seen))
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if self._counts and (s.presence_penalty or s.frequency_penalty):
            tokens, times = torch.tensor(list(self._counts)), torch.tensor(list(self._counts.values()))
            logits[tokens] -= s.presence_penalty + s.frequency_penalty * times
        for token, bias in s.bias.items():
            logits[token] += bias
        return logits

    def _candidates(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that may be chosen and their probabilities."""
        s, size = self.sampling, p.numel()
        if s.top_k or s.top_p < 1:
            for count in [s.top_k] if s.top_k else SORTED:
                weights, tokens = _largest(p, min(count, size))
                if s.top_k or count >= size or float(weights.sum()) >= s.top_p:
                    break
            if s.top_p < 1:  # of what top_k leaves, as others do
                before = weights.cumsum(0) - weights
                keep = max(int((before < s.top_p * (weights.sum() if s.top_k else 1.0)).sum()), 1)
                weights, tokens = weights[:keep], tokens[:keep]
        else:
            weights, tokens = p, torch.arange(size)
        if s.min_p > 0:
            kept = weights >= s.min_p * weights.max()
            weights, tokens = weights[kept], tokens[kept]
        return tokens, weights


def _only(logits: Tensor, allowed: Tensor) -> Tensor:
    """`logits` where `allowed`, which may be shorter or longer, says so."""
    size = min(len(logits), len(allowed))
    found = torch.full_like(logits, -torch.inf)
    found[:size] = torch.where(allowed[:size], logits[:size], -torch.inf)
    if not bool(allowed[:size].any()):
        raise DeadEndError("response_format: no token may follow")
    return found


def _largest(p: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest, largest first, the lower token first among equals at any count."""
    if count < p.numel():
        least = p.topk(count).values[-1]
        tokens = (p >= least).nonzero().squeeze(1)
    else:
        tokens = torch.arange(p.numel())
    weights, order = p[tokens].sort(descending=True, stable=True)
    return weights[:count], tokens[order][:count]


def log_probabilities(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural logarithm of the probability of `token`, and the `top` likeliest tokens with theirs, by raw logits."""
    values = torch.log_softmax(logits, 0)
    best, tokens = values.topk(top)
    return float(values[token]), list(zip(tokens.tolist(), best.tolist(), strict=True))
