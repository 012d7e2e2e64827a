"""A fused decoder layer's tensors, forward and backward, in the order in which nn/decoder_layer.py makes them.

Read the two side by side: a block taken in here is a tensor made there, under the same name. Per token and in bytes:
h, q, k, f elements of e bytes; r ranks and one number a norm or head in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.plan import gpu
from halfbyte.plan.architecture import Architecture
from halfbyte.plan.ledger import Ledger

SAVED, TEMPORARY, GRADIENTS = "activations_saved", "activations_temporary", "gradients"
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"), "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj"), "down": ("down_proj",),
}  # fmt: skip
"""Linear layers over one input."""
PANEL_ELEMENTS = 1 << 21
"""Decoded weights that a product in panels holds at once (kernels/panel.py)."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One pass over a layer.

    Attributes:
        tokens: of the micro-batch.
        itemsize: of the compute dtype.
        rank: of the adapters.
        adapted: last names of the linear layers that have one.
        checkpoint: only x and what the down projection's backward needs is kept.
        pairs: bfloat16 is multiplied in pairs (CPUs with AVX512-BF16), so packed rows take half the bytes.
        panel_rows: from how many tokens on products decode panels of a weight for torch; None: never.
        together: micro-batches that pass a layer one after the other before the next layer's turn.
        offloaded: what is saved for the backward pass goes to disk.
        on_gpu: computed by CUDA's kernels.
        dora: adapters have a magnitude of each row.
        embedding_rows, head_rows: of embedding and output head, how many are trained; shared where these are tied.
    """

    arch: Architecture
    tokens: int
    itemsize: int
    rank: int
    adapted: frozenset[str]
    checkpoint: bool
    pairs: bool
    panel_rows: int | None = None
    together: int = 1
    offloaded: bool = False
    on_gpu: bool = False
    dora: bool = False
    embedding_rows: int = 0
    head_rows: int = 0

    @property
    def tables(self) -> list[int]:
        """Elements of the trained rows, parameter by parameter."""
        rows = [self.embedding_rows] if self.arch.tied else [self.embedding_rows, self.head_rows]
        return [self.arch.hidden * count for count in rows if count]

    def kept(self, features: float, itemsize: int | None = None) -> int:
        """Bytes of (tokens, features), in the compute dtype or of `itemsize`, that wait for the backward pass."""
        return 0 if self.offloaded else int(self.together * self.tokens * features * (itemsize or self.itemsize))

    def rows(self, features: float) -> int:
        """Bytes of (tokens, features) in the compute dtype."""
        return int(self.tokens * features * self.itemsize)

    def floats(self, features: float) -> int:
        """Bytes of (tokens, features) in float32."""
        return int(self.tokens * features * 4)

    def members(self, group: str) -> list[tuple[str, int, int]]:
        """(name, out_features, in_features) of the linear layers of a group."""
        return [(name, *self.arch.linears[name]) for name in GROUPS[group] if name in self.arch.linears]

    def ranks(self, group: str) -> int:
        """Of the group's adapters together: the columns of u."""
        return sum(self.rank for name, _, _ in self.members(group) if name in self.adapted)

    def adapter_bytes(self, group: str) -> int:
        """A (r, in) and B (out, r) in float32, and DoRA's magnitudes (out)."""
        return sum(
            4 * (self.rank * (out + into) + (out if self.dora else 0))
            for name, out, into in self.members(group)
            if name in self.adapted
        )

    def stretched(self, group: str) -> int:
        """Columns that DoRA stretches."""
        return sum(out for name, out, _ in self.members(group) if self.dora and name in self.adapted)


def _product(led: Ledger, s: Sizes, group: str, *, backward: bool = False) -> None:
    """`_one_product`; DoRA's backward computes the outputs again, and stretches a copy of their gradient."""
    again = {"again": s.rows(sum(out for _, out, _ in s.members(group)))} if backward and s.stretched(group) else {}
    if again:
        led.hold(TEMPORARY, **again, u_again=s.floats(s.ranks(group)))
        _one_product(led, s, group)
        led.drop("u_again")
        led.hold(TEMPORARY, stretched=again["again"])
        led.drop("again")
    _one_product(led, s, group, backward=backward)
    led.drop(*(["stretched"] if again else []))


def _one_product(led: Ledger, s: Sizes, group: str, *, backward: bool = False) -> None:
    """What a group's product holds beside its results, gone when it returns: backward v, and in panels the decoded
    rows, forward u in the dtype of x, backward the float32 sum of dx where dx is not float32 (lora_panel.py). On a GPU
    the group's weights, decoded (cuda_lora.py)."""
    blocks = {"v": s.floats(s.ranks(group))} if backward else {}
    if s.on_gpu:
        blocks["u_narrow"] = s.rows(s.ranks(group))
        if s.tokens > gpu.FEW_ROWS:
            blocks["decoded"] = s.itemsize * sum(out * into for _, out, into in s.members(group))
    elif s.panel_rows is not None and s.tokens >= s.panel_rows:
        members = s.members(group)
        blocks["panel"] = s.itemsize * max(min(PANEL_ELEMENTS, out * into) for _, out, into in members)
        if backward and s.itemsize < 4:
            blocks["total"] = s.floats(members[0][2])
        elif not backward:
            blocks["u_narrow"] = s.rows(s.rank)
    led.hold(TEMPORARY, **blocks)
    led.drop(*blocks)


def until_down(led: Ledger, s: Sizes, p: str) -> None:
    """`_until_down`: leaves what `_Saved` names, and `rotated` where heads are normed."""
    a = s.arch
    led.hold(TEMPORARY, normed=s.rows(a.hidden))
    led.hold(SAVED, **{p + "rstd": s.floats(1)})
    led.hold(SAVED, **{p + "qkv": s.rows(a.qkv), p + "u_qkv": s.floats(s.ranks("qkv"))})
    _product(led, s, "qkv")
    if a.head_norms:
        led.hold(TEMPORARY, rotated=s.rows(a.qkv))
        led.hold(SAVED, **{p + "head_rstd": s.floats(a.heads + a.kv_heads)})
    led.hold(SAVED, **{p + "attention": s.rows(a.query), p + "lse": s.floats(a.heads)})
    led.drop("normed")
    led.hold(TEMPORARY, o=s.rows(a.hidden))
    led.hold(SAVED, **{p + "u_o": s.floats(s.ranks("o"))})
    _product(led, s, "o")
    if a.four_norms:
        led.move("o", p + "o_before", SAVED)
        led.hold(TEMPORARY, o=s.rows(a.hidden))
        led.hold(SAVED, **{p + "o_rstd": s.floats(1)})
    led.hold(SAVED, **{p + "h": s.rows(a.hidden), p + "h_rstd": s.floats(1)})
    led.hold(TEMPORARY, normed=s.rows(a.hidden))
    led.hold(SAVED, **{p + "gate_up": s.rows(2 * a.intermediate), p + "u_gate_up": s.floats(s.ranks("gate_up"))})
    _product(led, s, "gate_up")
    led.drop("normed", "o")


def saved_names(s: Sizes, p: str) -> list[str]:
    """The blocks that `until_down` leaves for the backward."""
    names = ["rstd", "qkv", "u_qkv", "attention", "lse", "u_o", "h", "h_rstd", "gate_up", "u_gate_up"]
    names += ["head_rstd"] if s.arch.head_norms else []
    names += ["o_before", "o_rstd"] if s.arch.four_norms else []
    return [p + name for name in names]


def forward(led: Ledger, s: Sizes, number: int, *, backward_follows: bool = True) -> None:
    """`DecoderLayer.forward` of layer `number`: the output "x{number}" becomes the next layer's "x{number + 1}"."""
    a, p = s.arch, f"{number}."
    until_down(led, s, p)
    led.hold(TEMPORARY, product=s.rows(a.intermediate))
    led.hold(SAVED, **{f"x{number + 1}": s.kept(a.hidden), p + "u_down": s.kept(s.ranks("down"), 4)})
    _product(led, s, "down")
    led.drop("product")
    if a.four_norms:
        led.move(f"x{number + 1}", p + "down")
        led.hold(SAVED, **{f"x{number + 1}": s.kept(a.hidden), p + "down_rstd": s.kept(1, 4)})
    if a.head_norms:
        led.drop("rotated")
    if s.checkpoint or not backward_follows:
        led.drop(*saved_names(s, p))
    if not backward_follows:
        led.drop(f"x{number}", p + "u_down", *([p + "down", p + "down_rstd"] if a.four_norms else []))


def backward(led: Ledger, s: Sizes, number: int, *, accumulate: bool) -> None:
    """`DecoderLayer.backward` of layer `number`: "g", the gradient at its output, becomes that at its input.

    Args:
        accumulate: gradients are there already, and what is made is added to them.
    """
    p = f"{number}."
    if s.checkpoint:
        until_down(led, s, p)
        if s.arch.head_norms:
            led.drop("rotated")
    _mlp_backward(led, s, p)
    _attention_backward(led, s, p, need_dx=number > 0)
    led.drop(*saved_names(s, p), p + "u_down", f"x{number}", "g")
    if s.arch.four_norms:
        led.drop(p + "down", p + "down_rstd")
    if number:
        led.move("dx", "g")
    if accumulate:
        led.drop(*(f"{p}d_{group}" for group in GROUPS))


def _gradients(led: Ledger, s: Sizes, p: str, group: str) -> None:
    led.hold(GRADIENTS, **{f"{p}d_{group}": s.adapter_bytes(group)})
    _product(led, s, group, backward=True)


def _flash_backward(s: Sizes) -> int:
    """Of FlashAttention: dq, dk and dv apart; the parts in which dq is summed up in float32, as many as keep the GPU
    busy; with fewer key heads than heads dk and dv of each head."""
    a = s.arch
    parts = -(-gpu.MULTIPROCESSORS // a.heads)
    of_each_head = s.rows(2 * a.query) if a.kv_heads < a.heads else 0
    return s.rows(a.qkv) + s.floats(parts * a.query + 2 * a.heads) + of_each_head


def _mlp_backward(led: Ledger, s: Sizes, p: str) -> None:
    """Leaves "g_h", the gradient at h, and "g_down" is gone."""
    a = s.arch
    if a.four_norms:
        led.hold(TEMPORARY, g_down=s.rows(a.hidden))
    led.hold(TEMPORARY, product=s.rows(a.intermediate))
    led.hold(TEMPORARY, g_product=s.rows(a.intermediate))
    _gradients(led, s, p, "down")
    led.drop("product")
    led.hold(TEMPORARY, g_gate_up=s.rows(2 * a.intermediate), product_again=s.rows(a.intermediate))
    led.hold(TEMPORARY, normed=s.rows(a.hidden))
    led.drop("product_again")
    led.hold(TEMPORARY, g_normed=s.rows(a.hidden))
    _gradients(led, s, p, "gate_up")
    led.hold(TEMPORARY, g_h=s.rows(a.hidden))
    led.drop("g_product", "g_gate_up", "normed", "g_normed", *(["g_down"] if a.four_norms else []))


def _attention_backward(led: Ledger, s: Sizes, p: str, *, need_dx: bool) -> None:
    """Leaves "dx", the gradient at x."""
    a = s.arch
    if a.four_norms:
        led.hold(TEMPORARY, g_o=s.rows(a.hidden))
    led.hold(TEMPORARY, g_attention=s.rows(a.query))
    _gradients(led, s, p, "o")
    if a.head_norms:
        led.hold(TEMPORARY, rotated=s.rows(a.qkv))
    if s.on_gpu:
        led.hold(TEMPORARY, flash=_flash_backward(s))
    led.hold(TEMPORARY, g_qkv=s.rows(a.qkv))
    if s.on_gpu:
        led.drop("flash")
    led.drop("g_attention", *(["rotated"] if a.head_norms else []))
    led.hold(TEMPORARY, normed=s.rows(a.hidden))
    if need_dx:
        led.hold(TEMPORARY, g_normed=s.rows(a.hidden))
    _gradients(led, s, p, "qkv")
    if need_dx:
        led.hold(TEMPORARY, dx=s.rows(a.hidden))
        led.drop("g_normed")
    led.drop("g_qkv", "normed", "g_h", *(["g_o"] if a.four_norms else []))
