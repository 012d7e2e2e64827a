"""Attention over sequences laid end to end: each by itself, no T x T mask, no work across boundaries.

Registered with transformers' public AttentionInterface by `enable_packed_attention`; where a model cannot take it,
transformers builds a block-diagonal mask from restarting position_ids, which is the same result at a higher price.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from halfbyte.kernels.attention import attends_natively
from halfbyte.kernels.cuda_attention import flash_serves

NAME = "halfbyte_packed"


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    seq_starts: list[int], parents: list[int] | None = None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention of every sequence on itself, and on what it goes on from.

    Args:
        query: (1, heads, T, head_dim); key and value may have fewer heads.
        seq_starts: cumulative lengths of the sequences, from 0 to T.
        parents: the sequence that each goes on from, or -1; None if none does.
        sliding_window: keys a token sees, itself included; None for all before it.

    Returns:
        (1, T, heads, head_dim), and None for the attention weights.
    """
    if _one_op_serves(query, key, value, dropout):
        heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        qkv = torch.cat([tensor.transpose(1, 2) for tensor in (query, key, value)], dim=2)
        starts = torch.tensor(seq_starts, dtype=torch.int32)
        before = None if parents is None else torch.tensor(parents, dtype=torch.int32)
        scale = head_dim**-0.5 if scaling is None else scaling
        out, _ = torch.ops.halfbyte.packed_attention(
            qkv[0].flatten(1), heads, kv_heads, starts, scale, sliding_window or 0, before
        )
        return out.view(1, -1, heads, head_dim), None
    if parents is not None:
        raise ValueError("sequences that go on from others need attention over heads of equal size, without dropout")
    return _one_by_one(query, key, value, seq_starts, scaling, dropout, sliding_window), None


def _one_op_serves(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    alike = key.shape == value.shape and key.shape[3] == query.shape[3] and query.dtype == key.dtype == value.dtype
    if not alike or dropout:
        return False
    if query.device.type == "cpu":
        return attends_natively(query.dtype, query.shape[3])
    return flash_serves(query.device, query.dtype, query.shape[3])


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, seq_starts: list[int], scaling: float | None, dropout: float,
    sliding_window: int | None,
) -> Tensor:  # fmt: skip
    """torch's attention, a call for each sequence."""
    dtype, grouped = query.dtype, key.shape[1] != query.shape[1]
    if query.device.type == "cpu":
        # torch's bfloat16 attention has a slow backward on CPUs: 1.9 ms where float32 takes 0.6 (9 heads, 64 tokens).
        query, key, value = query.float(), key.float(), value.float()
    outputs = []
    for start, stop in pairwise(seq_starts):
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        mask = None
        if sliding_window is not None and stop - start > sliding_window:
            ones = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device)
            mask = ones.tril().triu(1 - sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype)


def supports_packed_attention(model: PreTrainedModel) -> bool:
    """Whether every layer of `model` calls the attention interface with nothing that `packed_attention` lacks."""
    config = model.config.get_text_config()
    special = ("attn_logit_softcapping", "attention_chunk_size", "alibi")
    return bool(model._supports_attention_backend) and not any(getattr(config, name, None) for name in special)


@contextmanager
def enable_packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` use `packed_attention` inside the block; its own attention comes back after it."""
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
