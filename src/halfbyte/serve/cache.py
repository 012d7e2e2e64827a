"""Which blocks of the key-value cache hold what: allocation, sharing of what prompts begin with, eviction.

A full block is known by all tokens up to its end and by the content of the adapter that computed it: the same words
under another adapter, or under another version of it, are another block. A block that nobody uses any more stays until
its place is needed, the longest unused first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from halfbyte.kernels.batch_step import BLOCK


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block of `tokens` after the block of key `parent`; the first one's parent is its adapter's hash."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Blocks by number, 0 to `count` - 1. Not for several threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, unused; the longest unused first

    @property
    def in_use(self) -> int:
        """Blocks that a sequence holds."""
        return self.count - len(self._free) - len(self._idle)

    def take(self) -> int | None:
        """A block for one user, or None when all are in use."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        else:
            return None
        self._users[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        """The block known by `key`, with one user more; None where there is none."""
        block = self._block_of.get(key)
        if block is None:
            return None
        self._idle.pop(block, None)
        self._users[block] += 1
        return block

    def know(self, block: int, key: bytes) -> None:
        """`block` is full and holds what `key` says; the first block of a key stays the known one."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def give(self, block: int) -> None:
        """One user less."""
        self._users[block] -= 1
        assert self._users[block] >= 0
        if self._users[block] == 0:
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)


def shared_prefix(pool: BlockPool, root: bytes, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
    """Known blocks that `tokens` begin with, the last token left out, and their keys; the caller uses them now."""
    blocks: list[int] = []
    keys: list[bytes] = []
    key = root
    for start in range(0, (len(tokens) - 1) // BLOCK * BLOCK, BLOCK):
        key = chain(key, tokens[start : start + BLOCK])
        block = pool.find(key)
        if block is None:
            break
        blocks.append(block)
        keys.append(key)
    return blocks, keys
