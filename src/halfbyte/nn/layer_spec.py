"""What a decoder layer of transformers computes, read off its modules: by their shape, never by the model's name.

A description covers pre-norm layers with rotary attention and a gated MLP: Llama, Mistral, Qwen2 and 3, Gemma 1 and 3,
Phi-3 and what is built like them. Whoever computes by it must also try it out against the layer itself: nothing here
can see what the layer's own `forward` does with its modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from halfbyte.nn.linear4bit import Linear4bit

Groups = tuple[tuple[nn.Module, ...], tuple[nn.Module, ...], tuple[nn.Module, ...], tuple[nn.Module, ...]]
"""Linear layers over one input, together: qkv, o, gate_up, down."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm: ``x / sqrt(mean(x**2) + eps) * (offset + weight)`` over the last dimension."""

    weight: Tensor
    eps: float
    offset: float
    """1 where the weight is stored as its distance from 1 (Gemma), else 0."""


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer in 4 bits, and the one adapter that is active on it."""

    base: Linear4bit
    lora_A: Tensor | None = None  # noqa: N815 (PEFT's name)
    """(r, in_features) float32"""
    lora_B: Tensor | None = None  # noqa: N815
    """(out_features, r) float32"""
    scaling: float = 1.0
    magnitude: Tensor | None = None
    """DoRA's length of each row, (out_features,) float32"""


@dataclass(frozen=True)
class LayerSpec:
    """h = x + o(attention(rope(qkv(norm(x))))); y = h + down(act(gate(norm(h))) * up(norm(h))).

    Adapters come and go: `projection` reads what is on a linear layer at present.
    """

    input_norm: Norm
    qkv: tuple[nn.Module, ...]
    """q, k, v; or one layer that holds the three (Phi-3)."""
    o: nn.Module
    q_norm: Norm | None
    """Over each head's features, before the rotation."""
    k_norm: Norm | None
    post_attention_norm: Norm | None
    """On the attention's output before it is added (Gemma 2 and 3)."""
    mlp_norm: Norm
    gate_up: tuple[nn.Module, ...]
    """gate, up; or one layer that holds both."""
    down: nn.Module
    post_mlp_norm: Norm | None
    activation: str
    """"silu" or "gelu_tanh"."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int
    """Keys a token sees, itself included; 0 for all before it."""

    @property
    def groups(self) -> Groups:
        """The linear layers, those over one input together."""
        return self.qkv, (self.o,), self.gate_up, (self.down,)


def projection(module: nn.Module, *, training: bool) -> Projection | None:
    """`module` as a frozen 4-bit layer with at most one plain float32 LoRA adapter; None if there is more to it."""
    base = getattr(module, "base_layer", module)
    if isinstance(base, Linear4bit) and base.bias is not None and base.bias.requires_grad:
        return None
    if isinstance(module, Linear4bit):
        return Projection(module)
    if not isinstance(module, PeftLinear) or not isinstance(module.base_layer, Linear4bit):
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or not active:
        return None if module.merged else Projection(module.base_layer)
    name = active[0]
    drops = training and not isinstance(module.lora_dropout[name], nn.Identity)
    if len(active) > 1 or module.merged or drops or module.lora_bias.get(name):
        return None
    if not isinstance(module.lora_variant.get(name), DoraLinearVariant | None):
        return None
    magnitude = module.lora_magnitude_vector[name].weight if name in module.lora_variant else None
    lora_A, lora_B = module.lora_A[name].weight, module.lora_B[name].weight
    if any(t is not None and t.dtype != torch.float32 for t in (lora_A, lora_B, magnitude)):
        return None
    return Projection(module.base_layer, lora_A, lora_B, float(module.scaling[name]), magnitude)


def describe(layer: nn.Module) -> LayerSpec | None:
    """What `layer` computes, or None where its modules are not those of a layer that `LayerSpec` can say."""
    groups = linear_groups(layer)
    if groups is None:
        return None
    qkv, o, gate_up, down = groups
    attention, mlp = cast(nn.Module, layer.self_attn), cast(nn.Module, layer.mlp)
    norms, activation, heads = _norms(layer, attention), _activation(mlp), _heads(attention)
    if not (norms and activation and heads):
        return None
    known = {id(module) for module in (*qkv, *o, *gate_up, *down)} | {id(norm) for norm in norms.modules}
    if not _nothing_else(layer, known):
        return None
    return LayerSpec(
        qkv=qkv, o=o[0], gate_up=gate_up, down=down[0], activation=activation, **norms.by_field, **heads
    )  # fmt: skip


def linear_groups(layer: nn.Module) -> Groups | None:
    """The layer's linear layers as they are now, those over one input together: qkv, o, gate_up, down."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        return None
    qkv = _named(attention, ("q_proj", "k_proj", "v_proj")) or _named(attention, ("qkv_proj",))
    gate_up = _named(mlp, ("gate_proj", "up_proj")) or _named(mlp, ("gate_up_proj",))
    o, down = _named(attention, ("o_proj",)), _named(mlp, ("down_proj",))
    return (qkv, o, gate_up, down) if qkv and o and gate_up and down else None


def _named(parent: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, ...]:
    found = tuple(getattr(parent, name, None) for name in names)
    return cast(tuple[nn.Module, ...], found) if all(isinstance(module, nn.Module) for module in found) else ()


@dataclass(frozen=True)
class _Norms:
    by_field: dict[str, Any]
    modules: list[nn.Module]


def _norms(layer: nn.Module, attention: nn.Module) -> _Norms | None:
    """The layer's norms in their places; None if one is missing or no RMSNorm."""
    four = hasattr(layer, "pre_feedforward_layernorm")
    places = {
        "input_norm": getattr(layer, "input_layernorm", None),
        "post_attention_norm": getattr(layer, "post_attention_layernorm", None) if four else None,
        "mlp_norm": getattr(layer, "pre_feedforward_layernorm" if four else "post_attention_layernorm", None),
        "post_mlp_norm": getattr(layer, "post_feedforward_layernorm", None) if four else None,
        "q_norm": getattr(attention, "q_norm", None),
        "k_norm": getattr(attention, "k_norm", None),
    }
    by_field = {field: None if module is None else rms_norm(module) for field, module in places.items()}
    recognized = all((module is None) == (by_field[field] is None) for field, module in places.items())
    q, k = by_field["q_norm"], by_field["k_norm"]
    recognized &= (q is None) == (k is None) and (q is None or k is None or (q.eps, q.offset) == (k.eps, k.offset))
    if not recognized or by_field["input_norm"] is None or by_field["mlp_norm"] is None:
        return None
    return _Norms(by_field, [module for module in places.values() if module is not None])


def rms_norm(module: nn.Module) -> Norm | None:
    """`module` as RMSNorm, tried out on a row."""
    parameters = dict(module.named_parameters())
    eps = next(
        (getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)), None
    )
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1 or not isinstance(eps, float):
        return None
    weight = parameters["weight"]
    x = torch.linspace(-2, 3, weight.numel(), device=weight.device).unsqueeze(0)
    with torch.no_grad():
        y = module(x.to(weight.dtype)).float()
        for offset in (0.0, 1.0):
            expected = x * torch.rsqrt(x.square().mean() + eps) * (offset + weight.float())
            if torch.allclose(y, expected, rtol=2e-2, atol=1e-3):
                return Norm(weight, eps, offset)
    return None


def _activation(mlp: nn.Module) -> str:
    function: Any = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if function is None:
        return ""
    x = torch.linspace(-6, 6, 25)
    with torch.no_grad():
        y = function(x)
    if torch.allclose(y, F.silu(x), atol=1e-6):
        return "silu"
    return "gelu_tanh" if torch.allclose(y, F.gelu(x, approximate="tanh"), atol=1e-6) else ""


def _heads(attention: nn.Module) -> dict[str, Any]:
    """Head counts, scale and window of an attention module; empty where they are not plain."""
    config, head_dim = getattr(attention, "config", None), getattr(attention, "head_dim", None)
    scale = getattr(attention, "scaling", None)
    num_heads, num_kv_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if not all(isinstance(number, int) for number in (head_dim, num_heads, num_kv_heads)) or scale is None:
        return {}
    if not getattr(attention, "is_causal", False) or getattr(attention, "attn_logit_softcapping", None):
        return {}
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "scale": float(scale),
        "sliding_window": int(window or 0),
    }  # fmt: skip


def _nothing_else(layer: nn.Module, known: set[int]) -> bool:
    """Whether no parameter, buffer or dropout of `layer` lies outside of the `known` modules."""
    stack = [layer]
    while stack:
        module = stack.pop()
        if id(module) in known:
            continue
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own or (isinstance(module, nn.Dropout) and module.p > 0):
            return False
        stack.extend(module.children())
    return True
