"""Which samples share a sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

_OPEN_PACKS = 16
"""A sample moves by about this many packs. Measured on log-normal lengths: 8 fill 96 to 99 %, 16 fill 97 to 99 %,
64 hardly more; on lengths uniform from 2 to 88 % of a pack, the worst met, 92, 95 and 98 %."""


def pack_sequences(lengths: Sequence[int], max_seq_len: int, order: Iterable[int]) -> list[list[int]]:
    """Put samples together so that each pack has at most `max_seq_len` tokens.

    Samples are taken in `order`, each into the open pack it fills best; a bounded number of packs is open at a time,
    so the result stays close to the order given. Deterministic. For samples of 3, 2 and 4 tokens in one pack of 10::

        input_ids      a0 a1 a2 | b0 b1 | c0 c1 c2 c3
        position_ids    0  1  2 |  0  1 |  0  1  2  3
        labels          -  .  . |  -  . |  -  .  .  .      - is -100: nothing before it predicts it
        seq_starts      0          3       5             9

    Neither attention nor positions cross a bar, and the tenth place is not filled: there is no padding.

    Args:
        lengths: tokens of sample i, each at most `max_seq_len`.
        max_seq_len: tokens of the longest pack.
        order: indices into `lengths`, each at most once.

    Returns:
        Packs as lists of indices, in the order in which they were closed; every index of `order` exactly once.

    Raises:
        ValueError: a sample is longer than `max_seq_len`.
    """
    packs: dict[int, list[int]] = {}
    done: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room left, pack), sorted: the tightest first
    for opened, index in enumerate(order):
        length = int(lengths[index])
        if length > max_seq_len:
            raise ValueError(f"sample {index} has {length} tokens, more than max_seq_len {max_seq_len}")
        place = bisect_left(open_packs, (length, -1))
        if place < len(open_packs):
            room, pack = open_packs.pop(place)
        else:
            if len(open_packs) == _OPEN_PACKS:
                done.append(packs.pop(open_packs.pop(0)[1]))
            room, pack = max_seq_len, opened
            packs[pack] = []
        packs[pack].append(index)
        if room > length:
            insort(open_packs, (room - length, pack))
        else:
            done.append(packs.pop(pack))
    return done + list(packs.values())
