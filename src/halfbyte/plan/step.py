"""A micro-batch through the whole model: embeddings, layers, loss, and back. And one without gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

from halfbyte.dtypes import ITEMSIZE
from halfbyte.plan import gpu, plain
from halfbyte.plan import layer as fused
from halfbyte.plan.base import Base
from halfbyte.plan.layer import GRADIENTS, GROUPS, SAVED, TEMPORARY, Sizes
from halfbyte.plan.ledger import Ledger

LOGITS = "logits"
OFFLOADED_IN_MEMORY = 7
"""Layers' inputs that are in memory at most while they are kept on disk: the layer's own, three not yet written (the
one that is being made among them), two read ahead and one that has just been used (store/activations.py)."""
CHUNK_BYTES = 64 * 2**20
"""Of float32 logits at a time (nn/cross_entropy.py)."""


def chunk_rows(s: Sizes) -> int:
    """Rows of logits at a time, where there are as many."""
    return max((gpu.CHUNK_BYTES if s.on_gpu else CHUNK_BYTES) // (4 * s.arch.vocab), 16)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What goes through the model at once.

    Attributes:
        sizes: of a layer's pass; its tokens are the micro-batch's.
        targets: supervised tokens among them.
        accumulate: gradients of an earlier micro-batch are there.
    """

    base: Base
    sizes: Sizes
    targets: int
    accumulate: bool = False

    @property
    def loss_rows(self) -> int:
        """Rows of logits at a time."""
        return min(chunk_rows(self.sizes), max(self.targets, 1))


def train(led: Ledger, p: Pass) -> None:
    """Forward and backward; leaves the gradients, and nothing else."""
    s = p.sizes
    layers = fused if s.arch.fused else plain
    middle = _Middle(led, p)
    whole = replace(p, sizes=replace(s, tokens=s.together * s.tokens, together=1), targets=s.together * p.targets)
    led.where = "forward"
    _begin(led, whole)
    led.hold(TEMPORARY, on_the_way=_on_the_way(s))
    for number in middle.layers:
        led.where = f"forward, layer {number}"
        layers.forward(led, s, number)
        if number == 0:
            middle.hold_saved(led, s)
    led.where = "loss"
    _loss(led, whole)
    led.where = "backward of loss and norm"
    _loss_backward(led, whole)
    for number in reversed(middle.layers):
        led.where = f"backward, layer {number}"
        if number == 0:
            middle.exchange(led, s, accumulate=p.accumulate)
        layers.backward(led, s, number, accumulate=p.accumulate)
    led.drop("angles", "on_the_way")
    led.where = "backward of embedding"
    led.hold(GRADIENTS, embedding_gradient=4 * s.embedding_rows * s.arch.hidden)


def _on_the_way(s: Sizes) -> int:
    """What passes between layers: with several micro-batches together, their outputs and these joined, or the
    gradients split and joined; with offloading, the tensors that are being written or read."""
    joined = 2 * s.together * s.rows(s.arch.hidden) if s.together > 1 else 0
    return joined + (OFFLOADED_IN_MEMORY * s.together * s.rows(s.arch.hidden) if s.offloaded else 0)


def evaluate(led: Ledger, p: Pass) -> None:
    """Forward and loss without gradients: a layer's tensors are gone when it returns."""
    s = replace(p.sizes, checkpoint=False, together=1, offloaded=False)
    layers = fused if s.arch.fused else plain
    led.where = "evaluation"
    _begin(led, replace(p, sizes=s))
    layers.forward(led, s, 0, backward_follows=False)
    led.drop("angles")
    led.move("x1", "hidden")
    head_rows = p.targets
    led.hold(TEMPORARY, rows=head_rows * s.arch.hidden * s.itemsize)
    led.hold(LOGITS, logits=p.loss_rows * s.arch.vocab * s.itemsize)
    led.drop("hidden", "rows", "logits")


def _begin(led: Ledger, p: Pass) -> None:
    """The embedding's rows, in the compute dtype, and cosines and sines of the positions."""
    s = p.sizes
    stored = 4 if s.embedding_rows >= s.arch.vocab else ITEMSIZE[p.base.embedding_dtype]
    if p.base.int8_embeddings:  # codes and their float32 values, beside these in the dtype of the file
        led.hold(TEMPORARY, decoded=s.tokens * s.arch.hidden * (1 + 4 + stored))
        led.drop("decoded")
    if stored != s.itemsize:
        led.hold(TEMPORARY, looked_up=s.tokens * s.arch.hidden * stored)
    led.hold(SAVED, x0=s.kept(s.arch.hidden))
    if stored != s.itemsize:
        led.drop("looked_up")
    led.hold(SAVED, angles=2 * s.rows(s.arch.head_dim))


def _loss(led: Ledger, p: Pass) -> None:
    """The norm, the supervised rows, a chunk of logits, and the rows' gradient."""
    s, h = p.sizes, p.sizes.arch.hidden
    if s.arch.fused:
        led.hold(TEMPORARY, hidden=s.rows(h))
    else:
        _plain_norm(led, p)
    rows = p.targets * h * s.itemsize
    led.hold(TEMPORARY, rows=rows)
    led.hold(SAVED, d_rows=rows)
    led.hold(GRADIENTS, head_gradient=4 * s.head_rows * h)
    if s.arch.whole_logits:
        led.hold(LOGITS, logits=s.rows(s.arch.vocab) + 3 * s.floats(s.arch.vocab))
    else:
        led.hold(LOGITS, logits=p.loss_rows * s.arch.vocab * s.itemsize)
    led.drop("logits", "rows", "hidden")


def _plain_norm(led: Ledger, p: Pass) -> None:
    """As transformers wrote it: in 16 bits it keeps its input in float32, and not as it was."""
    s, h = p.sizes, p.sizes.arch.hidden
    led.hold(TEMPORARY, squares=s.floats(h))
    led.drop("squares")
    if s.itemsize == 2:
        led.hold(SAVED, norm_wide=s.floats(h))
    led.hold(TEMPORARY, norm_scaled=s.floats(h))
    led.hold(TEMPORARY, hidden=s.rows(h), **({"narrowed": s.rows(h)} if s.itemsize == 2 else {}))
    led.drop("norm_scaled", *(["narrowed", f"x{s.arch.layers}"] if s.itemsize == 2 else []))


def _loss_backward(led: Ledger, p: Pass) -> None:
    """The rows' gradient times 1, back into their places, and through the norm; leaves "g"."""
    s, h = p.sizes, p.sizes.arch.hidden
    rows = p.targets * h * s.itemsize
    led.hold(TEMPORARY, scaled=rows)
    led.drop("d_rows", *(["head_gradient"] if p.accumulate and not s.arch.tied else []))  # tied: waits
    led.hold(TEMPORARY, placed=s.rows(h))
    led.drop("scaled")
    led.hold(TEMPORARY, padded=s.rows(h))
    led.drop("placed")
    if s.arch.fused:
        led.hold(TEMPORARY, g=s.rows(h))
        led.drop("padded", f"x{s.arch.layers}")
        return
    led.hold(TEMPORARY, norm_backward=5 * s.floats(h))
    led.drop("padded", "norm_backward", "norm_wide" if s.itemsize == 2 else f"x{s.arch.layers}")
    led.hold(TEMPORARY, g=s.rows(h))


class _Middle:
    """Layers 1 to L - 2 as one block: they are all alike, so memory is at its fullest in the first or the last."""

    def __init__(self, led: Ledger, p: Pass) -> None:
        count = p.sizes.arch.layers
        self._lumped = 0 if led.keep_history or count < 4 else count - 2
        self.layers = [0, count - 1] if self._lumped else list(range(count))

    def hold_saved(self, led: Ledger, s: Sizes) -> None:
        """After the first layer: what the middle ones keep is as much as what that one keeps."""
        if self._lumped:
            mine = sum(size for name, (_, size) in led.held.items() if name.startswith("0.")) + s.kept(s.arch.hidden)
            led.hold(SAVED, middle=self._lumped * mine)
            led.move("x1", f"x{s.arch.layers - 1}")

    def exchange(self, led: Ledger, s: Sizes, *, accumulate: bool) -> None:
        """Before the first layer's backward: what they kept is gone, their gradients are there."""
        if self._lumped:
            led.drop("middle")
            if not accumulate:
                led.hold(GRADIENTS, middle_gradients=self._lumped * sum(s.adapter_bytes(group) for group in GROUPS))
