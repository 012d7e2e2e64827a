"""How far a merged model is from base + adapter, on tokens of the user's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halfbyte.config import DataConfig
from halfbyte.data import load_data
from halfbyte.model.lent import LentModel, Weights
from halfbyte.plan.merging import GROUP_TOKENS

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    \"\"\"Return the sum of a and b.\"\"\"\n    return a + b\n",
    "Water boils at 100 degrees Celsius at sea level; at higher altitudes it boils at lower temperatures.",
    "Q: What is 12 times 12?\nA: 144.\nQ: And 13 times 13?\nA: 169.",
    "Once upon a time there was a small village at the edge of a large forest, and nobody who went in came out.",
    "Dear Sir or Madam, thank you for your letter of 3 May, in which you ask about the state of your order.",
)  # fmt: skip
"""What is compared on where the user gives no data and the adapter records none that is still there."""


@dataclass(frozen=True)
class Probe:
    """Sequences to compare two models on.

    Attributes:
        ids: (tokens,) int64 each.
        counts: (tokens,) bool each: whether the prediction made at this token counts.
        origin: where they are from, in words.
    """

    ids: list[Tensor]
    counts: list[Tensor]
    origin: str

    def groups(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Padded (sequences, tokens) ids and counts, about GROUP_TOKENS each; long sequences first."""
        order = sorted(range(len(self.ids)), key=lambda i: -len(self.ids[i]))
        while order:
            size = max(GROUP_TOKENS // len(self.ids[order[0]]), 1)
            chosen, order = order[:size], order[size:]
            yield tuple(
                torch.nn.utils.rnn.pad_sequence([rows[i] for i in chosen], batch_first=True)
                for rows in (self.ids, self.counts)
            )  # type: ignore[misc]


def probe_of(path: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig, prompts: int) -> Probe:
    """The first `prompts` samples of the file `path`, at their supervised tokens; `PROMPTS` where it is empty."""
    if not path:
        rows = [torch.tensor(tokenizer(text).input_ids) for text in PROMPTS]
        counts = [torch.arange(len(row)) < len(row) - 1 for row in rows]
        return Probe(rows, counts, f"{len(rows)} general texts")
    data = load_data(path, tokenizer, config)
    examples = [data[i] for i in range(min(prompts, len(data)))]
    ids = [torch.from_numpy(e.input_ids).long() for e in examples]
    counts = [torch.from_numpy(e.labels != -100).roll(-1) for e in examples]
    which = f"the first {len(ids)} of {len(data)}" if len(ids) < len(data) else f"all {len(ids)}"
    return Probe(ids, counts, f"{which} samples of {path}")


def joined(probes: Sequence[Probe]) -> Probe:
    """All of `probes` as one."""
    return Probe(
        [ids for probe in probes for ids in probe.ids], [counts for probe in probes for counts in probe.counts],
        ", ".join(probe.origin for probe in probes),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A model against base + adapter, per supervised token of the probe, in float32."""

    max_logit: float
    """Largest difference of any logit."""
    kl: float
    """Mean KL divergence from base + adapter, nats per token."""
    greedy_agreement: float
    """Share of tokens at which both find the same next token likeliest."""
    loss: float
    """The model's own loss; `trained_loss` is that of base + adapter."""
    trained_loss: float
    tokens: int
    prompts: int
    on: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.2e} nats/token, same likeliest token at {self.greedy_agreement:.2%} of {self.tokens:,}, "
            f"largest logit difference {self.max_logit:.3g}, loss {self.loss:.4f} against {self.trained_loss:.4f}"
        )


@dataclass
class _Sums:
    max_logit: float = 0.0
    kl: float = 0.0
    same: int = 0
    loss: float = 0.0


@dataclass
class DriftMeter:
    """Compares sets of weights with those of base + adapter."""

    model: LentModel
    probe: Probe
    trained: Weights
    on_progress: Callable[[int, int], None] | None = None

    def measure(self, *candidates: Weights) -> list[Drift]:
        """Drift of each of `candidates`; base + adapter is computed once for all."""
        sums = [_Sums() for _ in candidates]
        loss, tokens = 0.0, 0
        for done, (ids, counts) in enumerate(self.probe.groups()):
            if self.on_progress:
                self.on_progress(done, 0)
            targets = ids.roll(-1, dims=1)[counts]
            reference = self._rows(ids, counts, self.trained)
            loss += float(F.cross_entropy(reference, targets, reduction="sum"))
            tokens += len(targets)
            for total, weights in zip(sums, candidates, strict=True):
                _add(total, reference, self._rows(ids, counts, weights), targets)
        count = max(tokens, 1)
        return [
            Drift(
                max_logit=s.max_logit, kl=s.kl / count, greedy_agreement=s.same / count, loss=s.loss / count,
                trained_loss=loss / count, tokens=tokens, prompts=len(self.probe.ids), on=self.probe.origin,
            )
            for s in sums
        ]  # fmt: skip

    def _rows(self, ids: Tensor, counts: Tensor, weights: Weights) -> Tensor:
        return self.model.logits(ids, weights)[counts]


def _add(total: _Sums, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
    for a, b, target in zip(*(rows.split(64) for rows in (reference, logits, targets)), strict=True):
        total.max_logit = max(total.max_logit, float((a - b).abs().max()))
        total.same += int((a.argmax(1) == b.argmax(1)).sum())
        log_a, log_b = a.double().log_softmax(1), b.double().log_softmax(1)
        total.kl += float((log_a.exp() * (log_a - log_b)).sum())
        total.loss -= float(log_b.gather(1, target[:, None]).sum())


def closest(drifts: Sequence[Drift]) -> int:
    """Which of `drifts` is the smallest, by KL."""
    return min(range(len(drifts)), key=lambda i: drifts[i].kl)
