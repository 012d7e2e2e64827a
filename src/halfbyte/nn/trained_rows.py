"""Input embedding and output head of which some rows, or all, are trained in float32 beside the frozen table."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.kernels.buffers import empty_like
from halfbyte.nn.int8_embedding import Int8Embedding

PANEL_ELEMENTS = 1 << 22
"""Of a chunk's pull on the logits, what is in float32 at a time where it is not so anyway."""


class TrainedRows(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """`base_layer`, with `rows` in place of those of the tokens `ids`; as it is while PEFT has adapters disabled.

    Args:
        base_layer: frozen.
        rows: (n, hidden_size) float32. A tied head and its embedding share them.
        ids: (n,) int64, each once; None: rows are the whole table.
    """

    ids: Tensor | None

    def __init__(self, base_layer: nn.Module, rows: nn.Parameter, ids: Tensor | None) -> None:
        super().__init__()
        self.base_layer, self.rows = base_layer, rows
        self.register_buffer("ids", ids, persistent=False)

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT calls it; the rows stay trainable."""
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """There is one."""

    def extra_repr(self) -> str:
        return "all rows" if self.ids is None else f"{len(self.ids)} rows"


class TrainedEmbedding(TrainedRows):
    """An input embedding: nn.Embedding, one of its subclasses, Int8Embedding or RowEmbedding."""

    def __init__(self, base_layer: nn.Module, rows: nn.Parameter, ids: Tensor | None) -> None:
        super().__init__(base_layer, rows, ids)
        lookup: Any = base_layer._lookup if type(base_layer) is Int8Embedding else base_layer
        # A subclass does more than looking up, such as scaling.
        scales = isinstance(lookup, nn.Embedding) and type(lookup) is not nn.Embedding
        self._lookup: list[nn.Embedding] = [lookup] if scales else []
        if scales:
            lookup.padding_idx = None  # a row of the table, not of those that are trained
        place = None
        if ids is not None:
            place = torch.full((int(ids.max()) + 1,), -1, dtype=torch.int64, device=ids.device)
            place[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("_place", place, persistent=False)
        with torch.no_grad():
            self._dtype = base_layer(torch.zeros(1, dtype=torch.int64, device=rows.device)).dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., hidden_size) in the compute dtype."""
        if self.disable_adapters:
            return cast(Tensor, self.base_layer(ids))
        if self.ids is None:
            return self._looked_up(ids)
        place = cast(Tensor, self._place)
        places = place[ids.flatten().clamp(max=len(place) - 1)]
        places = places.masked_fill(ids.flatten() >= len(place), -1)
        at = (places >= 0).nonzero().squeeze(1)
        out: Tensor = self.base_layer(ids)
        # None of them or some: the rows are part of the graph, so that every rank has their gradient.
        out.view(-1, out.shape[-1]).index_put_((at,), self._looked_up(places[at]))
        return out

    def _looked_up(self, places: Tensor) -> Tensor:
        rows: Tensor = _LookUp.apply(places, self.rows)  # type: ignore[no-untyped-call]
        if self._lookup:  # in the table's dtype, which is what the merged model will scale
            flat = rows.flatten(0, -2).to(self._lookup[0].weight.dtype)
            numbers = torch.arange(len(flat), device=flat.device).view(places.shape)
            rows = functional_call(self._lookup[0], {"weight": flat}, (numbers,))
        return rows.to(self._dtype)


class TrainedHead(TrainedRows):
    """An output head without bias: nn.Linear or FrozenLinear."""

    base_layer: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocabulary), in the dtype of `x`; all logits, differentiable in x and rows."""
        if self.disable_adapters:
            return cast(Tensor, self.base_layer(x))
        if self.ids is not None:
            return cast(Tensor, self.base_layer(x)).index_copy(-1, self.ids, x @ self.rows.to(x.dtype).T)
        if torch.is_grad_enabled():
            return F.linear(x, self.rows.to(x.dtype))
        return cast(Tensor, torch.ops.halfbyte.linear_frozen(x, self.rows, None))

    def loss_sum(self, hidden: Tensor, targets: Tensor, rows_per_chunk: int) -> Tensor:
        """Cross-entropy of `targets` (n,) int64 after `hidden` (n, hidden_size), summed, float32; differentiable in
        hidden and rows. Logits, and their gradient in their place, live for a chunk."""
        needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or self.rows.requires_grad)
        total: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
            hidden, self.rows, self, targets, rows_per_chunk, needs_grad
        )
        return total

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden_size) -> (n, vocabulary), nobody else's tensor."""
        ops = torch.ops.halfbyte
        if self.ids is None:
            return cast(Tensor, ops.linear_frozen(hidden, self.rows, None))
        logits: Tensor = ops.linear_frozen(hidden, self.base_layer.weight, None, self._scales)
        logits[:, self.ids] = hidden @ self.rows.to(hidden.dtype).T
        return logits

    def pull(self, pull: Tensor, hidden: Tensor, drows: Tensor) -> Tensor:
        """The gradient (n, hidden_size) of `hidden` by `pull` (n, vocabulary), the loss's on the logits, which may be
        lost; that of the rows is added to `drows`."""
        ops = torch.ops.halfbyte
        if self.ids is None:
            width = max(PANEL_ELEMENTS // max(len(pull), 1), 1)
            for part, sums in zip(pull.split(width, dim=1), drows.split(width), strict=True):
                sums.addmm_(part.T.to(drows.dtype), hidden.to(drows.dtype))
            return cast(Tensor, ops.linear_frozen_dx(pull, self.rows))
        own = pull[:, self.ids]
        pull[:, self.ids] = 0
        drows.addmm_(own.T.to(drows.dtype), hidden.to(drows.dtype))
        dx: Tensor = ops.linear_frozen_dx(pull, self.base_layer.weight, self._scales)
        return dx.addmm_(own, self.rows.to(own.dtype))

    @property
    def _scales(self) -> Tensor | None:
        return getattr(self.base_layer, "scales", None)


class _Loss(torch.autograd.Function):
    """`TrainedHead.loss_sum`: the loss and its gradients in one pass over chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, rows: Tensor, head: TrainedHead, targets: Tensor, chunk: int, needs_grad: bool
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(hidden) if needs_grad else None
        ctx.drows = _zeros_like(rows) if needs_grad else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = head.logits(hidden[part])
            total += torch.ops.halfbyte.softmax_cross_entropy_(logits, targets[part])
            if dx is not None:
                dx[part] = head.pull(logits, hidden[part], ctx.drows)
            del logits  # before the next chunk's are made
        ctx.save_for_backward(dx)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        drows, ctx.drows = ctx.drows, None  # as large as the table, perhaps: scaled in its place
        return dx * grad.to(dx.dtype), drows.mul_(grad.to(drows.dtype)), None, None, None, None


class _LookUp(torch.autograd.Function):
    """Rows of a table; its gradient lies where activations lay, as large as it may be."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = rows.detach()
        return F.embedding(places, ctx.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (places,) = ctx.saved_tensors
        grad = grad.to(ctx.rows.dtype)
        if grad.is_cuda:  # where adding by index has no order
            return None, torch.ops.aten.embedding_dense_backward(grad, places, len(ctx.rows), -1, False)
        drows = _zeros_like(ctx.rows)
        return None, drows.index_add_(0, places.flatten(), grad.flatten(0, -2))


def _zeros_like(rows: Tensor) -> Tensor:
    if rows.is_cuda:
        return torch.zeros_like(rows)
    return empty_like(rows).zero_().detach()  # autograd adds another gradient to it in its place, but not to a view
