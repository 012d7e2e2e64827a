"""Which rank keeps the moments of which adapter tensors, updates these, and gives them to the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.optim import AdamW
from halfbyte.train.ranks import Ranks

Groups = list[dict[str, Any]]


class Owners:
    """Of `groups` as an optimizer takes them, every tensor belongs to one rank, so that all have about as much.

    Numbers are those of one optimizer over all of `groups`, which checkpoints are written for.
    """

    def __init__(self, groups: Groups, ranks: Ranks) -> None:
        self._groups, self._ranks = groups, ranks
        self._params: list[Tensor] = [param for group in groups for param in group["params"]]
        loads = [0] * ranks.world
        self._owner: dict[int, int] = {}
        for number in sorted(range(len(self._params)), key=lambda n: -self._params[n].numel()):
            self._owner[number] = loads.index(min(loads))
            loads[self._owner[number]] += self._params[number].numel()
        self._own = [number for number in range(len(self._params)) if self._owner[number] == ranks.rank]

    def own_groups(self) -> Groups:
        """`groups` with this rank's tensors only."""
        own = {id(self._params[number]) for number in self._own}
        return [group | {"params": [p for p in group["params"] if id(p) in own]} for group in self._groups]

    def share(self) -> None:
        """After an update: every tensor becomes its owner's."""
        for rank in range(self._ranks.world):
            self._ranks.give([self._params[n].data for n in self._params_of(rank)], rank)

    def state_dict(self, optimizer: AdamW) -> dict[str, Any]:
        """What one optimizer over all groups would have, in every rank's memory for as long as it is kept."""
        own = optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        for number, param in enumerate(self._params):
            owner = self._owner[number]
            mine = own["state"][self._own.index(number)] if owner == self._ranks.rank else {}
            state[number] = self._given(mine, owner, param.device)
        groups, first = [], 0
        for mine, group in zip(own["param_groups"], self._groups, strict=True):
            count = len(group["params"])
            groups.append(mine | {"params": list(range(first, first + count))})
            first += count
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, optimizer: AdamW, state: Mapping[str, Any]) -> None:
        """Take this rank's part of what one optimizer over all groups had."""
        numbers = {number: place for place, number in enumerate(self._own)}
        groups = [
            group | {"params": [numbers[number] for number in group["params"] if number in numbers]}
            for group in state["param_groups"]
        ]
        mine = {numbers[n]: entries for n, entries in state["state"].items() if n in numbers}
        optimizer.load_state_dict({"state": mine, "param_groups": groups})

    def _params_of(self, rank: int) -> list[int]:
        return [number for number, owner in self._owner.items() if owner == rank]

    def _given(self, entries: Mapping[str, Any], owner: int, device: torch.device) -> dict[str, Any]:
        """One tensor's moments, which `owner` has."""
        kinds = {
            name: [str(value.dtype).removeprefix("torch."), list(value.shape)] if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }
        given: dict[str, Any] = dict(entries)
        for name, kind in self._ranks.said_by(owner, kinds).items():
            if not isinstance(kind, list):
                given[name] = kind
                continue
            if name not in given:
                given[name] = torch.empty(kind[1], dtype=getattr(torch, kind[0]), device=device)
            self._ranks.give([given[name]], owner)
        return given
