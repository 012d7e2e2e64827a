"""csrc/halfbyte.h for Python: its structures, constants and the types of every function."""

from __future__ import annotations

import ctypes as ct
from typing import Any

import torch

ABI_VERSION = 12
MAX_MEMBERS = 8
"""Layers of a group at most."""
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "neon")
"""Instruction sets in the library's numbering."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types in the library's numbering."""
WEIGHT_DTYPES = {**DTYPES, torch.int8: 3}
"""The same of a frozen weight that is not in 4 bits; int8 comes with scales."""

OK, UNSUPPORTED, NO_MEMORY = 0, 1, 2
"""What the functions return."""


class Weight(ct.Structure):
    """`hb_weight` of csrc/halfbyte.h."""

    _fields_ = (
        ("codes", ct.c_void_p),
        ("absmax", ct.c_void_p),
        ("nested_absmax", ct.c_void_p),
        ("dynamic_map", ct.c_void_p),
        ("codebook", ct.c_void_p),
        ("blocksize", ct.c_int64),
        ("nested_blocksize", ct.c_int64),
        ("rows", ct.c_int64),
        ("cols", ct.c_int64),
        ("nested_offset", ct.c_float),
        ("constants", ct.c_int32),
        ("bits", ct.c_int32),
    )


class StateMap(ct.Structure):
    """`hb_state_map` of csrc/halfbyte.h."""

    _fields_ = (("values", ct.c_void_p), ("bounds", ct.c_void_p), ("cells", ct.c_void_p))


class AdamwNumbers(ct.Structure):
    """`hb_adamw_numbers` of csrc/halfbyte.h."""

    _fields_ = tuple(
        (name, ct.c_float) for name in ("beta1", "rest1", "beta2", "rest2", "keep", "step_size", "root_scale", "eps")
    )


class AdamwPage(ct.Structure):
    """`hb_adamw_page` of csrc/halfbyte.h."""

    _fields_ = (
        ("param", ct.c_void_p),
        ("grad", ct.c_void_p),
        ("exp_avg", ct.c_void_p),
        ("exp_avg_absmax", ct.c_void_p),
        ("exp_avg_sq", ct.c_void_p),
        ("exp_avg_sq_absmax", ct.c_void_p),
        ("n", ct.c_int64),
        ("grad_dtype", ct.c_int64),
    )


class Packed(ct.Structure):
    """`hb_packed` of csrc/halfbyte.h."""

    _fields_ = (
        ("qkv", ct.c_void_p),
        ("seq_starts", ct.c_void_p),
        ("key_starts", ct.c_void_p),
        ("parents", ct.c_void_p),
        ("tokens", ct.c_int64),
        ("sequences", ct.c_int64),
        ("heads", ct.c_int64),
        ("kv_heads", ct.c_int64),
        ("head_dim", ct.c_int64),
        ("window", ct.c_int64),
        ("scale", ct.c_float),
        ("dtype", ct.c_int),
    )


class Matrix(ct.Structure):
    """`hb_matrix`."""

    _fields_ = (
        ("w4", ct.c_void_p),
        ("dense", ct.c_void_p),
        ("scales", ct.c_void_p),
        ("bias", ct.c_void_p),
        ("lora_A", ct.c_void_p),
        ("lora_B", ct.c_void_p),
        ("rank", ct.c_int64),
        ("rows", ct.c_int64),
        ("cols", ct.c_int64),
        ("dtype", ct.c_int32),
        ("scaling", ct.c_float),
    )


class Norm(ct.Structure):
    """`hb_norm`."""

    _fields_ = (("scale", ct.c_void_p), ("eps", ct.c_float))


KEY_BLOCK = 16
"""Positions whose keys lie side by side in the cache."""


class Layer(ct.Structure):
    """`hb_layer`."""

    _fields_ = (
        *((name, Norm) for name in (
            "input_norm", "q_norm", "k_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm"
        )),
        ("qkv", Matrix * 3),
        ("gate_up", Matrix * 2),
        ("o", Matrix),
        ("down", Matrix),
        *((name, ct.c_int32) for name in (
            "num_qkv", "num_gate_up", "heads", "kv_heads", "head_dim", "rotary_dim", "activation", "cache_dtype"
        )),
        ("window", ct.c_int64),
        ("scale", ct.c_float),
        *((name, ct.c_void_p) for name in ("cos", "sin", "keys", "values")),
    )  # fmt: skip


class Decoder(ct.Structure):
    """`hb_decoder`."""

    _fields_ = (
        ("layers", ct.c_void_p),
        ("num_layers", ct.c_int64),
        ("hidden_size", ct.c_int64),
        ("capacity", ct.c_int64),
        ("final_norm", Norm),
        ("head", Matrix),
    )


ADAPTED = 7
"""Matrices of a layer that an adapter may be on: q, k, v (or the three as one), o, gate, up (or both as one), down."""


class LowRank(ct.Structure):
    """`hb_low_rank`."""

    _fields_ = (
        ("A", ct.c_void_p), ("B", ct.c_void_p), ("rank", ct.c_int64), ("scaling", ct.c_float), ("dtype", ct.c_int32),
    )  # fmt: skip


class Row(ct.Structure):
    """`hb_row`."""

    _fields_ = (("position", ct.c_int64), ("blocks", ct.c_void_p), ("adapter", ct.c_void_p))


class Batch(ct.Structure):
    """`hb_batch`."""

    _fields_ = (
        ("rows", ct.c_void_p),
        ("count", ct.c_int64),
        ("num_blocks", ct.c_int64),
        ("x", ct.c_void_p),
        ("wanted", ct.c_void_p),
        ("num_wanted", ct.c_int64),
        ("logits", ct.c_void_p),
    )


class Member(ct.Structure):
    """`hb_member` of csrc/halfbyte.h."""

    _fields_ = (
        ("weight", Weight),
        ("bias", ct.c_void_p),
        ("lora_A", ct.c_void_p),
        ("lora_B", ct.c_void_p),
        ("grad_A", ct.c_void_p),
        ("grad_B", ct.c_void_p),
        ("rank", ct.c_int64),
        ("scaling", ct.c_float),
    )


_POINTER, _SIZE, _INT, _FLOAT = ct.c_void_p, ct.c_int64, ct.c_int, ct.c_float
# Every function is listed with its argument types: without them ctypes would cut a pointer to 32 bits.
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "hb_abi_version": (_INT, ()),
    "hb_isa_supported": (_INT, (_INT,)),
    "hb_isa_current": (_INT, ()),
    "hb_isa_force": (_INT, (_INT,)),
    "hb_has_fused_linear": (_INT, ()),
    "hb_has_attention": (_INT, (_SIZE,)),
    "hb_fast_bf16": (_INT, ()),
    "hb_openmp": (_INT, ()),
    "hb_release_workspace": (None, ()),
    "hb_quantize": (_INT, (_POINTER, _INT, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER, _INT)),
    "hb_codes_for_scales": (_INT, (_POINTER, _INT, *2 * [_SIZE], _POINTER, _INT, *3 * [_POINTER], _INT)),
    "hb_count_nonfinite": (_SIZE, (_POINTER, _INT, _SIZE, _INT)),
    "hb_dequantize": (_INT, (_POINTER, _SIZE, _SIZE, _INT, _POINTER, _INT)),
    "hb_quantize_8bit": (_INT, (_POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _INT)),
    "hb_least_error_scales": (
        _INT, (_POINTER, _INT, *2 * [_SIZE], _POINTER, _SIZE, *3 * [_POINTER], _INT, _POINTER, _INT),
    ),
    "hb_least_error_constants": (
        _INT, (_POINTER, _INT, *2 * [_SIZE], _POINTER, _SIZE, *4 * [_POINTER], _INT, _POINTER, _INT),
    ),
    "hb_choose_codes": (
        _INT, (*2 * [_POINTER], *2 * [_SIZE], _POINTER, _SIZE, *2 * [_POINTER], _INT, *2 * [_POINTER], _INT),
    ),
    "hb_adamw": (_INT, (_POINTER, _POINTER, _SIZE, _POINTER, _INT)),
    "hb_linear": (_INT, (_POINTER, _INT, _POINTER, _INT, _SIZE, _POINTER, _POINTER, _INT)),
    "hb_linear_backward": (
        _INT,
        (_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT, _SIZE, _POINTER, _POINTER, _INT),
    ),
    "hb_linear_frozen": (
        _INT, (*2 * [_POINTER], _INT, _SIZE, _SIZE, _POINTER, _INT, _SIZE, _POINTER, _POINTER, _INT),
    ),
    "hb_linear_frozen_dx": (_INT, (*2 * [_POINTER], _INT, _SIZE, _SIZE, _POINTER, _INT, _SIZE, _POINTER, _INT)),
    "hb_add_product": (
        _INT, (*2 * [_POINTER, _SIZE], _INT, *3 * [_SIZE], _FLOAT, _POINTER, _SIZE, _INT),
    ),
    "hb_improve_codes": (
        _INT, (*4 * [_POINTER], *2 * [_SIZE], *3 * [_POINTER], _INT, *2 * [_POINTER], _INT),
    ),
    "hb_softmax_cross_entropy": (_INT, (_POINTER, _INT, _SIZE, _SIZE, _POINTER, _POINTER, _INT, _INT)),
    "hb_rms_norm": (_INT, (*3 * [_POINTER], _INT, _INT, _SIZE, _SIZE, _FLOAT, _FLOAT, *3 * [_POINTER], _INT)),
    "hb_rms_norm_backward": (
        _INT, (*3 * [_POINTER], _INT, _INT, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _POINTER, _INT),
    ),
    "hb_rms_norm_heads": (
        _INT, (*3 * [_POINTER], _INT, _INT, *4 * [_SIZE], _FLOAT, _FLOAT, _POINTER, _POINTER, _INT),
    ),
    "hb_rms_norm_heads_backward": (
        _INT, (*4 * [_POINTER], _INT, _INT, _POINTER, *4 * [_SIZE], _FLOAT, _INT),
    ),
    "hb_rope": (_INT, (_POINTER, _INT, _POINTER, _POINTER, _INT, *5 * [_SIZE], _INT, _INT)),
    "hb_gated": (_INT, (_POINTER, _INT, _SIZE, _SIZE, _INT, _POINTER, _INT)),
    "hb_gated_backward": (_INT, (_POINTER, _POINTER, _INT, _SIZE, _SIZE, _INT, _POINTER, _POINTER, _INT)),
    "hb_attention": (_INT, (_POINTER, _POINTER, _POINTER, _INT)),
    "hb_attention_backward": (_INT, (*5 * [_POINTER], _INT)),
    "hb_token_step": (_INT, (_POINTER, _SIZE, _POINTER, _POINTER, _INT)),
    "hb_batch_step": (_INT, (_POINTER, _POINTER, _INT)),
    "hb_multiply_add": (_SIZE, (_SIZE, _INT)),
    "hb_read_all": (ct.c_float, (_POINTER, _SIZE, _INT)),
}  # fmt: skip
