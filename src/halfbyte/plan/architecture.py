"""What a model is made of, read off its config.json: sizes of a decoder layer, its linear layers, its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.config.model_config import check_sizes
from halfbyte.errors import ModelError

FUSED = {
    "llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"head_norms": True},
    "gemma": {}, "gemma3_text": {"head_norms": True, "four_norms": True}, "phi3": {"packed": True},
}  # fmt: skip
"""Families whose layers run as one function (nn/layer_spec.py), and where they differ from Llama."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a decoder.

    Attributes:
        heads: query heads.
        tied: the output head is the embedding.
        head_norms: q and k are normed head by head.
        four_norms: what attention and MLP give is normed before it is added.
        packed: one layer holds q, k and v, and one gate and up (Phi-3).
        fused: the layers run as one function each.
        intermediate: features between a token's MLP layers; in a mixture of all experts that it goes through.
        experts: of a mixture, in a layer; 0 for a dense model.
        experts_per_token: of them, that each token goes through.
        expert_width: features between an expert's layers.
        dtype: of the stored weights.
        whole_logits: the architecture changes logits after its output layer, so the loss holds them all.
        whole_scores: its attention holds the scores of all heads.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    head_norms: bool = False
    four_norms: bool = False
    packed: bool = False
    fused: bool = True
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    dtype: str = "bfloat16"
    context: int = 0
    whole_logits: bool = False
    whole_scores: bool = False

    @property
    def query(self) -> int:
        """Features of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Features of all keys of a token, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Features of a token's queries, keys and values."""
        return self.query + 2 * self.key

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of a layer's linear layers, by name; without a mixture's MLPs."""
        h, f = self.hidden, self.intermediate
        qkv = {"q_proj": (self.query, h), "k_proj": (self.key, h), "v_proj": (self.key, h)}
        gate_up = {"gate_proj": (f, h), "up_proj": (f, h)}
        if self.packed:
            qkv, gate_up = {"qkv_proj": (self.qkv, h)}, {"gate_up_proj": (2 * f, h)}
        if self.experts:
            return {**qkv, "o_proj": (h, self.query)}
        return {**qkv, "o_proj": (h, self.query), **gate_up, "down_proj": (h, f)}

    @property
    def expert_linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of an expert's linear layers, by name."""
        h, f = self.hidden, self.expert_width
        return {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)} if self.experts else {}

    @property
    def widest(self) -> int:
        """The largest side of a linear layer."""
        return max(side for shape in (*self.linears.values(), *self.expert_linears.values()) for side in shape)


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The sizes that a config.json of transformers says.

    Raises:
        ModelError: it does not say them.
    """
    check_sizes(config, where)
    text = config.get("text_config") or config
    family = str(text.get("model_type", config.get("model_type", "")))

    def size(*names: str, default: int | None = None) -> int:
        value = next((text[name] for name in names if text.get(name) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ModelError(f"the config has no {names[0]}", where=where, why="the plan is made from it")
        return value

    hidden, heads = size("hidden_size", "n_embd", "d_model"), size("num_attention_heads", "n_head")
    special = FUSED.get(family, {})
    capped = bool(text.get("attn_logit_softcapping"))
    scaled = any(
        text.get(name) not in (None, 1, 1.0) for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")
    )
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=0)
    dense = size("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    chosen = size("num_experts_per_tok", "num_experts_per_token", default=1) if experts else 0
    width = size("moe_intermediate_size", default=dense) if experts else 0
    shared = size("shared_expert_intermediate_size", default=width * size("n_shared_experts", default=0))
    intermediate = max(chosen * width + shared, dense if width != dense else 0) if experts else dense
    tied_by_default = family.startswith(("gemma", "gpt2"))
    return Architecture(
        family=family, hidden=hidden, heads=heads, fused=family in FUSED and not capped,
        whole_logits=scaled, whole_scores=capped,
        intermediate=intermediate,
        layers=size("num_hidden_layers", "n_layer"), kv_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=hidden // max(heads, 1)), vocab=size("vocab_size"),
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", tied_by_default))),
        qkv_bias=bool(text.get("attention_bias", special.get("qkv_bias", False))),
        head_norms=bool(special.get("head_norms")), four_norms=bool(special.get("four_norms")),
        packed=bool(special.get("packed")),
        experts=experts, experts_per_token=chosen, expert_width=width,
        dtype=str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16"),
        context=size("max_position_embeddings", "n_positions", default=0),
    )  # fmt: skip
