"""A decoder layer as transformers wrote it, with our adapted linear layers: a cautious estimate, tensor by tensor.

What autograd keeps depends on each architecture's own code, which a config does not show. Counted here are the tensors
of a layer in Llama's manner, the most that was found; `MARGIN` covers what others add.
"""

from __future__ import annotations

from halfbyte.plan.layer import GRADIENTS, GROUPS, SAVED, TEMPORARY, Sizes
from halfbyte.plan.ledger import Ledger

MARGIN = 1.25


def saved_bytes(s: Sizes) -> int:
    """Norms: input in float32 and output, twice; q, k, v, rotated and joined; attention's output twice and its sums;
    gate, up, act(gate), product; u of every adapter; scores or a mask where the attention has them; of a mixture what
    each expert gives a token, the router's probabilities and places."""
    a = s.arch
    norms = 2 * (s.rows(a.hidden) + s.floats(a.hidden)) * (2 if a.four_norms else 1)
    attention = s.rows(2 * a.qkv + 2 * a.query + a.hidden) + s.floats(a.heads)
    mlp = s.rows(4 * a.intermediate)
    ranks = s.floats(sum(s.ranks(group) for group in GROUPS))
    scores = 4 * s.tokens * s.tokens * (2 * a.heads if a.whole_scores else 1)
    experts = s.rows(a.experts_per_token * a.hidden) + s.floats(3 * a.experts + 8 * a.experts_per_token)
    return int(MARGIN * (norms + attention + mlp + ranks + scores + experts))


def temporary_bytes(s: Sizes) -> int:
    """The largest moment of a layer's forward or backward, beside what is kept."""
    a = s.arch
    decoded = max(out * into for out, into in a.linears.values()) if s.dora else 0  # PEFT's own DoRA, thrice and BA
    experts = s.rows(4 * a.experts_per_token * a.hidden)  # sorted by expert, and back
    return int(MARGIN * (s.rows(3 * a.intermediate + a.qkv) + s.floats(4 * a.hidden) + experts)) + 4 * 4 * decoded


def forward(led: Ledger, s: Sizes, number: int, *, backward_follows: bool = True) -> None:
    """As `layer.forward`."""
    kept = backward_follows and not s.checkpoint
    led.hold(SAVED, **{f"{number}.saved": saved_bytes(s) if kept and not s.offloaded else 0})
    led.hold(TEMPORARY, layer=temporary_bytes(s) + (0 if kept else s.rows(2 * s.arch.intermediate)))
    led.drop("layer")
    led.hold(SAVED, **{f"x{number + 1}": s.kept(s.arch.hidden)})
    if not backward_follows:
        led.drop(f"x{number}", f"{number}.saved")


def backward(led: Ledger, s: Sizes, number: int, *, accumulate: bool) -> None:
    """As `layer.backward`; with checkpointing the layer is computed again first."""
    led.hold(TEMPORARY, again=saved_bytes(s) if s.checkpoint else 0)
    led.hold(GRADIENTS, **{f"{number}.d": sum(s.adapter_bytes(group) for group in GROUPS)})
    led.hold(TEMPORARY, layer=temporary_bytes(s), dx=s.rows(s.arch.hidden))
    led.drop("layer", "again", f"{number}.saved", f"x{number}", "g")
    led.move("dx", "g") if number else led.drop("dx")
    if accumulate:
        led.drop(f"{number}.d")
