"""Many answers at once, on one thread: continuous batching over one base and its adapters.

Every turn of the loop computes the next token of each answer that is being written, and beside them a part of the
prompts that wait, all in one forward pass. An answer joins and leaves at any turn. What it says does not depend on the
others: a row of the pass is the same to the bit in any company, so a sequence whose blocks were taken away for another
one is computed anew and goes on as if nothing had happened.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.kernels.batch_step import BLOCK, Row
from halfbyte.serve.cache import BlockPool, chain, shared_prefix
from halfbyte.serve.sampling import DeadEndError, log_probabilities
from halfbyte.serve.sequence import Finished, Order, Token
from halfbyte.serve.sequence import Sequence as Running

log = logging.getLogger(__name__)
MOST_ROWS = 64
"""Tokens of one forward pass, so that prompts hold up the answers beside them for a few tens of milliseconds."""


class FullError(Exception):
    """No room in the queue."""


class StoppedError(Exception):
    """The engine takes no more orders."""


class Runner(Protocol):
    """What the engine computes with."""

    num_blocks: int
    context: int

    def run(self, ids: Sequence[int], rows: Sequence[Row], wanted: Sequence[int]) -> Tensor:
        """As BatchDecoder.run."""


class Counts:
    """What has happened so far; written by the engine's thread alone."""

    def __init__(self) -> None:
        self.steps = self.rows = self.prompt_tokens = self.reused_tokens = self.new_tokens = 0
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "cancelled": 0, "refused": 0, "error": 0}
        self.recomputed = 0


class Engine:
    """Takes orders from any thread.

    Args:
        most_running: answers that are written at once.
        most_waiting: orders in the queue.
        on_death: called when the engine's thread ends by an error of its own.
    """

    def __init__(
        self, runner: Runner, *, most_running: int = 16, most_waiting: int = 64,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._runner, self._most_running, self._most_waiting = runner, most_running, most_waiting
        self._on_death = on_death
        self.pool = BlockPool(runner.num_blocks)
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._changed = threading.Condition()
        self._stopping = False
        self.counts = Counts()
        self.last_turn = time.monotonic()
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, orders: Sequence[Order]) -> list[Running]:
        """Queue the answers of one request, all of them or none.

        Raises:
            FullError: the queue has no room.
            StoppedError: the engine is stopping, or has died.
        """
        made = [Running(order) for order in orders]
        with self._changed:
            if self._stopping or not self.alive:
                raise StoppedError
            if len(self._waiting) + len(made) > self._most_waiting:
                raise FullError
            self._waiting.extend(made)
            self._changed.notify()
        return made

    def cancel(self, sequences: Sequence[Running]) -> None:
        """Leave off: blocks are free within a turn."""
        with self._changed:
            for sequence in sequences:
                sequence.cancelled = True
            self._changed.notify()

    def stop(self, seconds: float) -> None:
        """Take no more orders, finish what is there within `seconds`, cancel the rest."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self.alive:
            self._thread.join(seconds)
        if self.alive:
            self.cancel([*self._running, *self._waiting])
            self._thread.join(10)

    # ---- the engine's thread ----

    def _live(self) -> None:
        try:
            while self._wait():
                self.last_turn = time.monotonic()
                self._turn()
        except BaseException:
            log.exception("the engine died")
            for sequence in [*self._running, *self._waiting]:
                sequence.order.put(Finished("error", "the engine died"))
            self._on_death()

    def _wait(self) -> bool:
        """Until there is something to do; False when there will be nothing any more."""
        with self._changed:
            while not self._running and not self._waiting:
                if self._stopping:
                    return False
                self._changed.wait()
                self.last_turn = time.monotonic()
        return True

    def _turn(self) -> None:
        for sequence in [s for s in self._running if s.cancelled]:
            self._finish(sequence, Finished("cancelled"))
        self._admit()
        parts = self._parts()
        if parts:
            # Rows of one adapter side by side: its matrices are then read once for all of them.
            self._pass(sorted(parts, key=lambda part: part[0].order.served.content))

    def _pass(self, parts: list[tuple[Running, int]]) -> None:
        """Compute `parts` together. Where that fails each goes by itself, with the same result: only those fail then
        whose own failure it was."""
        ids: list[int] = []
        rows: list[Row] = []
        wanted: list[int] = []  # rows whose logits are wanted, and for whom
        owners: list[tuple[Running, int]] = []
        for sequence, count in parts:
            table, adapter = sequence.table(), sequence.order.served.adapter
            for position in range(sequence.computed, sequence.computed + count):
                if position == len(sequence.tokens) - 1 or self._tells(sequence, position):
                    wanted.append(len(rows))
                    owners.append((sequence, position))
                ids.append(sequence.tokens[position])
                rows.append(Row(position, table, adapter))
        try:
            logits = self._runner.run(ids, rows, wanted)
        except (MemoryError, RuntimeError, ValueError) as error:
            if len(parts) > 1:
                for part in parts:
                    self._pass([part])
            else:
                log.exception("a forward pass failed")
                self._finish(parts[0][0], Finished("error", f"{type(error).__name__} in the forward pass"))
            return
        self.counts.steps += 1
        self.counts.rows += len(rows)
        for sequence, count in parts:
            self._computed(sequence, count)
        self._answer(owners, logits)

    def _tells(self, sequence: Running, position: int) -> bool:
        return sequence.order.prompt_logprobs and sequence.told <= position < len(sequence.order.prompt) - 1

    def _admit(self) -> None:
        with self._changed:
            gone = [s for s in self._waiting if s.cancelled]
            for sequence in gone:
                self._waiting.remove(sequence)
        for sequence in gone:
            self._finish(sequence, Finished("cancelled"))
        while self._waiting and len(self._running) < self._most_running:
            sequence = self._waiting[0]
            if self._same_prompt_ahead(sequence):
                return
            if not sequence.order.prompt_logprobs:
                root = sequence.order.served.content
                sequence.blocks, sequence.keys = shared_prefix(self.pool, root, sequence.tokens)
            sequence.computed = sequence.reused = len(sequence.blocks) * BLOCK
            self.counts.reused_tokens += sequence.computed
            with self._changed:
                self._waiting.popleft()
                self._running.append(sequence)

    def _same_prompt_ahead(self, sequence: Running) -> bool:
        """Whether the first block of `sequence` is being computed now, so that it pays to wait for it."""
        if sequence.order.prompt_logprobs or len(sequence.tokens) <= BLOCK:
            return False
        prompt, content = sequence.tokens[:BLOCK], sequence.order.served.content
        reading = [other for other in self._running if other.computed < len(other.order.prompt) - 1]
        return any(other.order.served.content == content and other.tokens[:BLOCK] == prompt for other in reading)

    def _parts(self) -> list[tuple[Running, int]]:
        """Who computes how many tokens in this pass: the next one of every answer first, then parts of prompts."""
        parts: list[tuple[Running, int]] = []
        room = MOST_ROWS
        for sequence in sorted(self._running, key=lambda s: s.ahead > 1):  # stable: the oldest first
            if sequence not in self._running or not room:
                continue  # gave its blocks to an older one, just now
            count = min(sequence.ahead, room)
            while sequence.blocks_for(count) > 0:
                block = self.pool.take()
                if block is not None:
                    sequence.blocks.append(block)
                elif not self._take_back(sequence, parts):
                    break
            count = min(count, len(sequence.blocks) * BLOCK - sequence.computed)
            if count > 0:
                parts.append((sequence, count))
                room -= count
        return parts

    def _take_back(self, sequence: Running, parts: list[tuple[Running, int]]) -> bool:
        """Free the blocks of the youngest answer that is younger than `sequence`: it is computed anew later."""
        youngest = self._running[-1]
        if youngest is sequence or any(part[0] is youngest for part in parts):
            return False
        self._release(youngest)
        self.counts.recomputed += youngest.computed
        youngest.computed = 0
        with self._changed:
            self._running.remove(youngest)
            self._waiting.appendleft(youngest)
        return True

    def _release(self, sequence: Running) -> None:
        for block in sequence.blocks:
            self.pool.give(block)
        sequence.blocks, sequence.keys = [], []

    def _computed(self, sequence: Running, count: int) -> None:
        before = sequence.computed
        sequence.computed += count
        self.counts.prompt_tokens += max(min(sequence.computed, len(sequence.order.prompt)) - before, 0)
        for index in range(len(sequence.keys), sequence.computed // BLOCK):
            parent = sequence.keys[-1] if sequence.keys else sequence.order.served.content
            key = chain(parent, sequence.tokens[index * BLOCK : (index + 1) * BLOCK])
            sequence.keys.append(key)
            self.pool.know(sequence.blocks[index], key)

    def _answer(self, owners: list[tuple[Running, int]], logits: Tensor) -> None:
        likeliest = logits.numpy().argmax(1)  # a tenth of the time of torch's; a NaN counts as the largest
        sound = torch.isfinite(logits[torch.arange(len(owners)), torch.from_numpy(likeliest)]).tolist()
        for row, ((sequence, position), token) in enumerate(zip(owners, likeliest.tolist(), strict=True)):
            if sequence not in self._running:
                continue
            if not sound[row]:
                self._finish(sequence, Finished("error", "the logits are not finite"))
                continue
            try:
                self._tell(sequence, position, token, logits[row])
            except DeadEndError as error:
                self._finish(sequence, Finished("refused", str(error)))
            except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
                log.exception("an answer failed")  # it alone
                self._finish(sequence, Finished("error", f"{type(error).__name__} while a token was chosen"))

    def _tell(self, sequence: Running, position: int, likeliest: int, logits: Tensor) -> None:
        if position < len(sequence.order.prompt) - 1:
            sequence.told = position + 1
            sequence.order.put(self._token(sequence, logits, sequence.tokens[position + 1], prompt=True))
        else:
            plain = sequence.order.sampling.plain
            self._say(sequence, likeliest if plain else sequence.sampler.choose(logits), logits)

    def _say(self, sequence: Running, token: int, logits: Tensor) -> None:
        order = sequence.order
        if sequence.generated == order.max_tokens:  # 0: the prompt alone was wanted
            self._finish(sequence, Finished("length"))
            return
        if token in order.stops:
            self._finish(sequence, Finished("stop"))
            return
        sequence.tokens.append(token)
        sequence.sampler.took(token)
        self.counts.new_tokens += 1
        order.put(self._token(sequence, logits, token))
        if sequence.generated == order.max_tokens or len(sequence.tokens) >= self._runner.context:
            self._finish(sequence, Finished("length"))

    def _token(self, sequence: Running, logits: Tensor, token: int, *, prompt: bool = False) -> Token:
        if sequence.order.logprobs is None:
            return Token(token, prompt=prompt)
        return Token(token, *log_probabilities(logits, token, sequence.order.logprobs), prompt=prompt)

    def _finish(self, sequence: Running, event: Finished) -> None:
        self._release(sequence)
        with self._changed:
            if sequence in self._running:
                self._running.remove(sequence)
        self.counts.finished[event.reason] += 1
        sequence.order.put(event)
