"""What a run keeps on disk: what its memory has no room for, and what it leaves."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.config import RunConfig
from halfbyte.dtypes import format_bytes, parse_bytes
from halfbyte.plan import step
from halfbyte.plan.base import Base
from halfbyte.plan.layer import SAVED, Sizes
from halfbyte.plan.ledger import Ledger
from halfbyte.plan.machine import Machine
from halfbyte.plan.phases import STATE_BLOCK, Work, adapter_parameters, sizes, state_blocks, state_bytes

SCRATCH = ("moments", "activations")
"""Terms that lie in memory.offload_dir and go with the process; the others lie in train.output."""
PAGE, BLOCK = 1 << 20, 4096
"""Bytes of a page of moments (optim/paged.py), less for small budgets, and of the disk's block."""
BLOCK_BYTES = {32: 8 * STATE_BLOCK, 8: 2 * (STATE_BLOCK + 4)}
"""What a block of moments takes of a page."""
RING = 8
"""Pages' room through which the others pass: each has its place on disk too (store/page_pool.py)."""


def on_disk(config: RunConfig, base: Base, machine: Machine, work: Work) -> dict[str, int]:
    """Bytes at the most, by what they are for; terms that take nothing are left out."""
    s = sizes(config, base, machine, work.tokens)
    twice = s.arch.hidden * s.head_rows if s.arch.tied else 0  # the file has a tied table under both names
    adapter = 4 * (adapter_parameters(s) + twice)
    checkpoint = adapter + state_bytes(s, config.optim.bits)
    terms = {
        "moments": _paged(config, s),
        "activations": _saved(base, s) if s.offloaded else 0,
        "checkpoints": (config.train.keep + 1) * checkpoint if config.train.save_every else 0,  # one before one goes
        "adapter": adapter,
    }
    return {name: size for name, size in terms.items() if size}


def _paged(config: RunConfig, s: Sizes) -> int:
    """Pages that do not stay in memory for good."""
    budget = parse_bytes(config.memory.optimizer_budget)
    page = min(PAGE, max(BLOCK, budget // 8 // BLOCK * BLOCK))
    blocks = state_blocks(s, config.optim.bits)
    pages = sum(-(-count // (page // BLOCK_BYTES[bits])) for bits, count in blocks.items())
    slots = budget // page
    if not config.optim.paged or pages <= slots:
        return 0
    return (pages - slots + min(RING, max(2, slots // 3))) * page


def _saved(base: Base, s: Sizes) -> int:
    """What the forward keeps for the backward, were it in memory; a layer that is computed again stays there."""
    led = Ledger(keep_history=True)
    step.train(led, step.Pass(base=base, sizes=replace(s, offloaded=False), targets=1))
    return next(moment.terms.get(SAVED, 0) for moment in led.history if moment.where == "loss")


def disk_text(terms: dict[str, int]) -> str:
    """What is on disk, for people."""
    return "on disk: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in terms.items())
