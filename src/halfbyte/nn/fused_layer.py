"""A fused decoder layer in the place of a transformers one, over the same modules under the same names."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.nn.decoder_layer import DecoderCall, DecoderLayer, Group
from halfbyte.nn.fused_norm import FusedNorm, fused_norm
from halfbyte.nn.layer_spec import LayerSpec, describe, linear_groups, projection

_STATES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
"""What torch and transformers set on layers: a fused one keeps it in the layer it stands for."""


class FusedLayer(nn.Module):
    """In the place of a transformers decoder layer, over the same modules under the same names.

    Computes as one function when the call is plain (causal attention within sequences, nothing recorded, 4-bit linear
    layers with at most one LoRA adapter each and no dropout), and calls the layer it stands for otherwise.
    """

    def __init__(self, layer: nn.Module, spec: LayerSpec) -> None:
        self.__dict__["_plain"] = layer  # not a child: the children are shared, and their names stay
        super().__init__()
        del self.__dict__["training"]
        self._modules = layer._modules
        self.spec = spec

    @property
    def plain(self) -> nn.Module:
        """The layer that this one stands for."""
        layer: nn.Module = self.__dict__["_plain"]
        return layer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.plain)  # transformers knows by their class the layers whose outputs it records

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STATES:
            setattr(self.plain, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.plain, name)  # what a model's own code reads off its layers

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer it stands for.

        Args:
            seq_starts: cumulative lengths of the sequences packed into one row, from 0.
            parents: the sequence that each goes on from, or -1; None if none does.
            micro_batches: cumulative numbers of tokens; what lies between two of them goes through the layer by
                itself, with the activations and the gradients, to the bit, of a call of its own.
        """
        call = None if args else self._call(hidden_states, **kwargs)
        if call is None:
            return self.plain(hidden_states, *args, **kwargs)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        bounds = kwargs.get("micro_batches")
        if bounds is not None:
            return self._one_by_one(rows, call, bounds).view(hidden_states.shape)
        y, qkv = DecoderLayer.apply(rows, call, *call.adapters)  # type: ignore[no-untyped-call]
        cache = kwargs.get("past_key_values")
        if cache is not None:
            self._fill(cache, qkv, hidden_states.shape[0])
        return y.view(hidden_states.shape)

    def _one_by_one(self, rows: Tensor, call: DecoderCall, bounds: list[int]) -> Tensor:
        """(T, hidden) -> (T, hidden), micro-batch after micro-batch while the layer's bytes are there."""
        outputs: list[Tensor] = []
        # The last one first: autograd goes backwards, so gradients are added up in the order of the micro-batches.
        for start, stop in reversed(list(pairwise(bounds))):
            y, _ = DecoderLayer.apply(rows[start:stop], call.part(start, stop), *call.adapters)  # type: ignore[no-untyped-call]
            outputs.insert(0, y)
        return torch.cat(outputs)

    @property
    def _index(self) -> int:
        index: int = self.get_submodule("self_attn").layer_idx  # type: ignore[assignment]
        return index

    def _fill(self, cache: Any, qkv: Tensor, batch: int) -> None:
        """Put keys and values into transformers' cache of this layer."""
        spec = self.spec
        heads = qkv.view(batch, -1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim).transpose(1, 2)
        key, value = heads[:, spec.num_heads :].chunk(2, dim=1)
        cache.update(key, value, self._index)

    def _call(
        self, x: Tensor, *, attention_mask: Tensor | None = None, past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None, seq_starts: list[int] | None = None,
        parents: list[int] | None = None, output_attentions: bool = False, **_: Any,
    ) -> DecoderCall | None:  # fmt: skip
        """This use of the layer, or None where it is not one that the fused function covers."""
        if attention_mask is not None or position_embeddings is None or output_attentions:
            return None
        if past_key_values is not None and past_key_values.get_seq_length(self._index):
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        if linear_groups(self.plain) != self.spec.groups:  # an adapter was attached since
            spec = describe(self.plain)
            if spec is None:
                return None
            self.spec = spec
        qkv, o, gate_up, down = (self._group(modules, x.dtype) for modules in self.spec.groups)
        if qkv is None or o is None or gate_up is None or down is None:
            return None
        batch, length = x.shape[0], x.shape[1]
        starts = seq_starts if seq_starts is not None else list(range(0, batch * length + 1, length))
        cos, sin = (t.expand(batch, -1, -1).reshape(batch * length, -1) for t in position_embeddings)
        return DecoderCall(
            self.spec, qkv, o, gate_up, down, cos, sin, torch.tensor(starts, dtype=torch.int32),
            None if parents is None else torch.tensor(parents, dtype=torch.int32),
            checkpoint=self.training and bool(getattr(self.plain, "gradient_checkpointing", False)),
            backward_follows=torch.is_grad_enabled(), streamed=getattr(self.plain, "streamed", None),
        )  # fmt: skip

    def _group(self, modules: tuple[nn.Module, ...], dtype: torch.dtype) -> Group | None:
        members = tuple(projection(module, training=self.training) for module in modules)
        found = tuple(p for p in members if p is not None)
        kinds = {(p.base.quant_type, p.base.blocksize) for p in found}
        same = all(p.base.compute_dtype in (None, dtype) for p in found)
        return Group(found) if len(found) == len(members) and len(kinds) == 1 and same else None


def fuse_layers(model: nn.Module) -> int:
    """Put a `FusedLayer` in the place of every decoder layer of `model` that it covers, and a `FusedNorm` in that of
    the norm behind them; how many layers there were.

    Covered is a layer that can be described, whose linear layers are all in 4 bits with at most one plain LoRA adapter
    each, and on which nobody has put a hook: inside a fused layer the modules are not called. Parameters keep their
    names and identity. Whether the layers then compute what they did is for the caller to try: a description cannot
    see what a layer's own `forward` does beyond its modules.
    """
    covered = {}
    for name, module in model.named_modules():
        candidate = hasattr(module, "self_attn") and not isinstance(module, FusedLayer) and not _hooked(module)
        spec = describe(module) if candidate else None
        if spec is not None and all(projection(m, training=True) for group in spec.groups for m in group):
            covered[name] = FusedLayer(module, spec)
    for name, layer in covered.items():
        model.set_submodule(name, layer)
    for decoder in {name.rpartition(".")[0].rpartition(".")[0] for name in covered}:
        norm = fused_norm(getattr(model.get_submodule(decoder), "norm", None))
        if norm is not None:
            model.set_submodule(f"{decoder}.norm" if decoder else "norm", norm)
    return len(covered)


def _hooked(layer: nn.Module) -> bool:
    """Whether anyone waits for calls of the modules."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in layer.modules())


def unfuse_layers(model: nn.Module) -> None:
    """Put back what `fuse_layers` replaced."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedLayer | FusedNorm):
            model.set_submodule(name, module.plain)
