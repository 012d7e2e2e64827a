"""One answer in the making."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import torch

from halfbyte.kernels.batch_step import BLOCK, Adapter
from halfbyte.serve.sampling import Sampler, Sampling


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the answer, or of the prompt where its log-probabilities are wanted (`prompt`)."""

    id: int
    logprob: float | None = None
    top: Tokens[tuple[int, float]] = ()
    prompt: bool = False


@dataclass(frozen=True)
class Finished:
    """The end of an answer: "stop" (an end token), "length", "cancelled", "refused" (its form), or "error"."""

    reason: str
    error: str = ""


Event = Token | Finished


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that requests may name, or the base (`adapter` is None).

    Attributes:
        content: hash of everything that it computes with.
    """

    name: str
    content: bytes
    adapter: Adapter | None
    created: int = 0


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a client wants.

    Attributes:
        put: called on the engine's thread with every event of the answer; the last one is `Finished`.
        logprobs: likeliest tokens whose log-probabilities come along; None for none at all.
        prompt_logprobs: the prompt's tokens come first, with theirs.
        stops: tokens that end the answer; they are not part of it.
    """

    served: ServedAdapter
    prompt: Tokens[int]
    max_tokens: int
    put: Callable[[Event], None]
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    prompt_logprobs: bool = False
    stops: frozenset[int] = frozenset()


class Sequence:
    """An order on its way through the engine: tokens, how many of them are computed, and the blocks that hold them."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.tokens = array("i", order.prompt)  # a tenth of a list's memory: thousands may wait
        self.computed = 0
        self.reused = 0
        """Tokens of the prompt that were computed for an earlier one."""
        self.sampler = Sampler(order.sampling, order.prompt)
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.cancelled = False
        self.told = 0
        """Tokens of the prompt whose log-probabilities have been sent."""

    @property
    def ahead(self) -> int:
        """Tokens that are known and not yet computed."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.order.prompt)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that are missing before `tokens` more can be computed."""
        return -(-(self.computed + tokens) // BLOCK) - len(self.blocks)

    def table(self) -> torch.Tensor:
        """The blocks, as the kernel takes them."""
        return torch.tensor(self.blocks, dtype=torch.int32)
