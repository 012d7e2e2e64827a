"""Blocks of memory by name: what is held when, and the most there is at once."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Moment:
    """What is held, in bytes by term, when a block was taken in; `where` says during what."""

    where: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


@dataclass
class Ledger:
    """Takes blocks in and lets them go, as a program allocates and frees, and remembers the fullest moment.

    Attributes:
        where: what is going on, for `Moment.where`.
        peak: the fullest moment so far.
        history: every moment, for a picture; kept only if asked for.
    """

    keep_history: bool = False
    where: str = ""
    held: dict[str, tuple[str, int]] = field(default_factory=dict)
    terms: dict[str, int] = field(default_factory=dict)
    total: int = 0
    peak: Moment = field(default_factory=lambda: Moment("", {}))
    history: list[Moment] = field(default_factory=list)
    _most: int = -1

    def hold(self, term: str, **blocks: float) -> None:
        """Take in blocks of `term`, each under its name."""
        for name, size in blocks.items():
            assert name not in self.held, f"{name} is held already"
            self.held[name] = term, int(size)
            self.terms[term] = self.terms.get(term, 0) + int(size)
            self.total += int(size)
        self._note()

    def drop(self, *names: str) -> None:
        """Let blocks go."""
        for name in names:
            term, size = self.held.pop(name)
            self.terms[term] -= size
            self.total -= size

    def move(self, name: str, new: str, term: str | None = None) -> None:
        """The block goes on under another name, and perhaps as another term."""
        old, size = self.held[name]
        self.drop(name)
        self.held[new] = term or old, size
        self.terms[term or old] = self.terms.get(term or old, 0) + size
        self.total += size

    def _note(self) -> None:
        if self.total > self._most:
            self._most = self.total
            self.peak = Moment(self.where, dict(self.terms))
        if self.keep_history:
            self.history.append(Moment(self.where, dict(self.terms)))
