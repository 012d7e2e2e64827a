"""What `halfbyte serve` holds: the base, the cache of keys and values, adapters, and what a pass and answers take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.config import RunConfig
from halfbyte.dtypes import ITEMSIZE, format_bytes
from halfbyte.plan.base import Base
from halfbyte.plan.budget import Budget
from halfbyte.plan.files import safetensors_tensors
from halfbyte.plan.machine import Machine
from halfbyte.plan.phases import Work, compute_dtype, runtime_bytes, static

BLOCK, ROWS, TRIED = 16, 64, 24
"""Positions of a block of the cache, tokens of a pass (serve/engine.py), and of the trial (model/batch.py)."""
GROWTH = 15_000_000
"""What Python and the libraries still take after the plan: a model's modules, code that is touched first, threads."""
HTTP = 40_000_000
"""Bodies that are being read or judged, at most (serve/bodies.py), and connections."""
NUMBERS = 2 * 4
"""Bytes of a token of an answer that runs or waits: in its order, and in its sequence."""
ANSWER = 4096
"""Bytes of an answer beside its tokens."""
TRIAL, SAMPLED = 5, 6
"""Alive at once: float32 tensors of the trial's logits, and of a row's while a token is chosen."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a base is to be served.

    Attributes:
        cache_tokens: whose keys and values are kept, of all sequences.
        context: tokens that a sequence may have.
        answers: that run or wait at once.
        adapters: folders of those that are loaded at the start.
        reloads: whether one may be read while answers are written.
        http: whether over HTTP.
        runtime: resident bytes, the tokenizer's included, before the base is loaded; None: what is known of this
            machine.
        so_far: most bytes that were resident until then.
    """

    cache_tokens: int
    context: int
    answers: int
    adapters: Sequence[Path] = ()
    reloads: bool = True
    http: bool = True
    runtime: int | None = None
    so_far: int = 0


@dataclass(frozen=True)
class ServingPlan:
    """Bytes by term.

    Attributes:
        terms: what is held while answers are written.
        loading: most that is held beside base and runtime before that, for a moment.
        so_far: most that was resident before anything was loaded.
        adapter_itemsize: bytes of a number of an adapter in memory.
    """

    terms: dict[str, int]
    loading: int
    so_far: int
    adapter_itemsize: int
    kv_token: int

    @property
    def peak_memory(self) -> int:
        resident = sum(self.terms[name] for name in ("runtime", "base"))
        return max(sum(self.terms.values()), resident + self.loading, self.so_far)

    def with_cache(self, tokens: int) -> ServingPlan:
        """The same with a cache of so many tokens."""
        return replace(self, terms={**self.terms, "kv_cache": tokens * self.kv_token})

    def most_cache_tokens(self, budget: int) -> int:
        """The largest cache that `budget` leaves room for, in whole blocks; 0 where there is none."""
        room = budget - self.with_cache(0).peak_memory
        return max(room, 0) // (self.kv_token * BLOCK) * BLOCK

    def room_for_adapters(self, budget: int) -> int:
        """What adapters may take, one while it is read included."""
        return budget - sum(size for name, size in self.terms.items() if not name.startswith("adapter"))


def plan_serving(config: RunConfig, base: Base, machine: Machine, serving: Serving) -> ServingPlan:
    """The plan, from headers of files alone. Raises ModelError: an adapter's header is damaged."""
    arch, itemsize = base.architecture, ITEMSIZE[compute_dtype(config, machine)]
    runtime = runtime_bytes(base, machine) if serving.runtime is None else serving.runtime
    held = static(config, base, machine, Work(tokens=1, targets=1, longest=1, runtime=runtime)).terms
    stored = [list(safetensors_tensors(folder).values()) for folder in serving.adapters]
    adapters = [sum(tensor.elements for tensor in tensors) * itemsize for tensors in stored]
    read = max((sum(tensor.nbytes for tensor in tensors) for tensors in stored), default=0)
    kv_token = 2 * arch.layers * arch.key * itemsize
    positions = min(serving.context, arch.context or serving.context)
    widest = max(arch.hidden, arch.intermediate, arch.query)
    row = 2 * arch.hidden + 2 * widest + arch.qkv + 2 * arch.intermediate + 128
    own = arch.hidden + arch.heads // max(arch.kv_heads, 1) * positions + 1024
    terms = {
        "runtime": runtime, "base": sum(held.values()) - runtime,
        "kv_cache": max(serving.cache_tokens // BLOCK, 2) * BLOCK * kv_token,
        "adapters": sum(adapters), "adapter_reading": read if serving.reloads else 0,
        "workspace": 4 * (ROWS * row + machine.threads * own + 2 * positions * arch.head_dim),
        "logits": 4 * arch.vocab * (ROWS + SAMPLED), "answers": serving.answers * (NUMBERS * positions + ANSWER),
        "growth": GROWTH, "http": HTTP if serving.http else 0,
    }  # fmt: skip
    loading = max(base.load_extra, 4 * TRIAL * TRIED * arch.vocab, sum(adapters) + read)
    return ServingPlan(terms, loading, serving.so_far, adapter_itemsize=itemsize, kv_token=kv_token)


def serving_text(plan: ServingPlan, budget: Budget | None) -> str:
    """The plan for people."""
    terms = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.terms.items() if size)
    of = f" of {format_bytes(budget.bytes)} ({budget.source})" if budget else ""
    return f"planned memory: {format_bytes(plan.peak_memory)}{of}: {terms}"
