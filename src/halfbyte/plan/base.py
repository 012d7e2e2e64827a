"""The base's bytes in memory: 4-bit layers with their scales, embeddings, head, norms; and while it loads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from halfbyte.config import QuantConfig
from halfbyte.config.formats import STATE_KEYS, bits_of, constants_of
from halfbyte.config.model_config import read_model_config
from halfbyte.dtypes import ITEMSIZE
from halfbyte.plan.architecture import FUSED, Architecture, architecture
from halfbyte.plan.files import StoredTensor, locate, read_gguf, safetensors_tensors

NESTED_BLOCKSIZE = 256
SLICE_ELEMENTS = 8 * 2**20
"""As model/load.py reads a weight that is to be quantized."""
TOKENIZER_FILE = "tokenizer.json"
_SCALES = (".absmax", ".nested_absmax")
_TABLES = (".quant_map", ".nested_quant_map", *(f".{key}" for key in STATE_KEYS))
INT8_BLOCK = 64
_LAYER = re.compile(r".*?\.\d+\.")
"""The decoder layer that a tensor belongs to: its name up to the first number."""
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "token_embd", "embed_in")
HEADS = ("lm_head", "embed_out", "output")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model and what it takes, in bytes unless said otherwise.

    Attributes:
        linears: 4-bit weights with their scales.
        linear_weights: how many weights these are.
        expert_weights: of them, those of a mixture's experts, of which a token sees some.
        layer: of `linears`, the largest decoder layer's without its scales of scales.
        nested: of `linears`, what stays in memory when layers are streamed: the scales of scales.
        embeddings, head: in the dtype of the file or in int8; head is 0 where it is the embedding.
        other: what stays unquantized beside them, and norms and biases in the compute dtype.
        load_extra: most that loading one tensor takes beside the result.
        tokenizer_file: bytes of tokenizer.json; None where there is none to look at.
        exact: sizes are those of the files, not of the config alone.
        linear_names: full names of the linear layers but the head, as far as they are known; empty: not at all.
        in_4_bits: the files hold the 4-bit bytes themselves, so layers can be read from them at any time.
    """

    architecture: Architecture
    linears: int
    linear_weights: int
    nested: int
    embeddings: int
    head: int
    other: int
    load_extra: int
    embedding_dtype: str
    tokenizer_file: int | None
    exact: bool
    layer: int
    expert_weights: int = 0
    in_4_bits: bool = False
    int8_embeddings: bool = False
    linear_names: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        return self.linears + self.embeddings + self.head + self.other


def quantized_bytes(weights: int, quant: QuantConfig) -> int:
    """codes ceil(n bits/8); scales, and offsets: a byte a block and 4 bytes for 256 of them, or 4 bytes a block."""
    constants = constants_of(quant.quant_type) * -(-weights // quant.blocksize)
    scales = constants + 4 * -(-constants // NESTED_BLOCKSIZE) if quant.double_quant else 4 * constants
    return -(-weights * bits_of(quant.quant_type) // 8) + scales


def stored_bits(tensors: dict[str, StoredTensor], name: str) -> int:
    """Of a code of the stored weight `name`, by the key of its JSON."""
    return next((bits_of(key.rpartition("__")[2]) for key in STATE_KEYS if f"{name}.{key}" in tensors), 4)


def int8_bytes(shape: tuple[int, ...]) -> int:
    """A byte a weight, and 4 for 64 columns of a row."""
    return shape[0] * (shape[1] + 4 * -(-shape[1] // INT8_BLOCK))


def slice_bytes(tensor: StoredTensor) -> int:
    """What is in memory of `tensor`, as it is stored, while it is quantized."""
    return min(tensor.elements, SLICE_ELEMENTS) * ITEMSIZE[tensor.dtype]


def load_extra(weights: int, itemsize: int, quant: QuantConfig) -> int:
    """A slice as it is stored, and the codes (n bits/8) and float32 scales (4 n/b) in parts, before they are one.

    The whole weight as it is stored, where the slices are put together before they are quantized.
    """
    large = weights > SLICE_ELEMENTS
    in_parts = -(-weights * bits_of(quant.quant_type) // 8) if large else 0
    in_parts += weights * itemsize if large and quant.whole_weights else 0
    return min(weights, SLICE_ELEMENTS) * itemsize + in_parts + 3 * 4 * -(-weights // quant.blocksize)


def read_base(path: str, quant: QuantConfig, compute_dtype: str) -> Base:
    """The base model called `path`: from its files' headers where there are files, else from its config.json.

    Raises:
        ModelError: no such model, or its config or a header cannot be read.
    """
    local = locate(path)
    if local.is_file():
        fields, tensors = read_gguf(local)
        arch = architecture(_gguf_config(fields, tensors), path)
        names = expected_linears(arch)
        return _base(arch, tensors, quant, compute_dtype, tokenizer_file=None, exact=True, linear_names=names)
    config = read_model_config(local / "config.json")
    arch = architecture(config, path)
    tensors = safetensors_tensors(local)
    tokenizer = local / TOKENIZER_FILE
    return _base(
        arch, tensors or expected_tensors(arch), quant, compute_dtype, exact=bool(tensors),
        linear_names=_stored_linears(arch, tensors) if tensors else expected_linears(arch),
        tokenizer_file=tokenizer.stat().st_size if tokenizer.exists() else None,
    )  # fmt: skip


def expected_tensors(arch: Architecture) -> dict[str, StoredTensor]:
    """The tensors of a model of which there is only a config."""
    h, dtype = arch.hidden, arch.dtype
    tensors = {"model.embed_tokens.weight": StoredTensor((arch.vocab, h), dtype)}
    if not arch.tied:
        tensors["lm_head.weight"] = StoredTensor((arch.vocab, h), dtype)
    for layer in range(arch.layers):
        place = f"model.layers.{layer}"
        for name, shape in arch.linears.items():
            tensors[f"{place}.{name}.weight"] = StoredTensor(shape, dtype)
            if arch.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{place}.{name}.bias"] = StoredTensor(shape[:1], dtype)
        for expert in range(arch.experts):
            for name, shape in arch.expert_linears.items():
                tensors[f"{place}.mlp.experts.{expert}.{name}.weight"] = StoredTensor(shape, dtype)
        if arch.experts:
            tensors[f"{place}.mlp.gate.weight"] = StoredTensor((arch.experts, h), dtype)
        norms = (4 if arch.four_norms else 2) * h + (2 * arch.head_dim if arch.head_norms else 0)
        tensors[f"{place}.norms"] = StoredTensor((norms,), dtype)
    tensors["model.norm.weight"] = StoredTensor((h,), dtype)
    return tensors


def expected_linears(arch: Architecture) -> frozenset[str]:
    """Full names of the linear layers of a model of a known family; empty: not a known one."""
    if arch.family not in FUSED:
        return frozenset()
    blocks = {name: "mlp" if name.startswith(("gate", "up", "down")) else "self_attn" for name in arch.linears}
    return frozenset(f"model.layers.{n}.{block}.{name}" for n in range(arch.layers) for name, block in blocks.items())


def _stored_linears(arch: Architecture, tensors: dict[str, StoredTensor]) -> frozenset[str]:
    """Names of the matrices but embeddings, head and routers."""
    modules = (
        name.removesuffix(".weight") for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and not _is_router(arch, name, tensor)
    )  # fmt: skip
    return frozenset(name for name in modules if name.rpartition(".")[2] not in EMBEDDINGS and name not in HEADS)


def _is_router(arch: Architecture, name: str, tensor: StoredTensor) -> bool:
    return arch.experts > 0 and tensor.shape[0] == arch.experts and name.endswith((".gate.weight", ".router.weight"))


def _base(
    arch: Architecture, tensors: dict[str, StoredTensor], quant: QuantConfig, compute_dtype: str, *,
    tokenizer_file: int | None, exact: bool, linear_names: frozenset[str],
) -> Base:  # fmt: skip
    weights = nested = embeddings = head = other = extra = expert_weights = 0
    layers: dict[str, int] = {}
    embedding_dtype, int8 = arch.dtype, quant.embeddings == "int8"
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        last, added, found = module.rpartition(".")[2], 0, _LAYER.match(name)
        layer = found[0] if found else ""
        if name.endswith(_TABLES) or name.endswith("rotary_emb.inv_freq"):
            continue
        if name.endswith(_SCALES):
            is_nested = name.endswith(".nested_absmax")
            nested += tensor.nbytes if is_nested else 0
            layers[layer] = layers.get(layer, 0) + (0 if is_nested else tensor.nbytes)
        elif len(tensor.shape) < 2 or _is_router(arch, name, tensor):
            other += tensor.elements * ITEMSIZE[compute_dtype]
        elif last in EMBEDDINGS:
            embeddings, embedding_dtype = embeddings + _table_bytes(tensor, last, int8), tensor.dtype
            extra = max(extra, slice_bytes(tensor) if int8 else 0)
        elif last in HEADS and "." not in module:
            head += 0 if arch.tied else _table_bytes(tensor, last, int8)
            extra = max(extra, slice_bytes(tensor) if int8 else 0)
        elif tensor.dtype == "uint8":  # bitsandbytes' codes
            added, size = 8 * tensor.nbytes // stored_bits(tensors, name), tensor.nbytes
        elif leaf != "weight" or len(tensor.shape) > 2 or _skipped(module, quant):
            other += tensor.nbytes
        else:
            added, size = tensor.elements, quantized_bytes(tensor.elements, quant)
            extra = max(extra, load_extra(tensor.elements, ITEMSIZE[tensor.dtype], quant))
        if added:
            layers[layer] = layers.get(layer, 0) + size
            weights, expert_weights = weights + added, expert_weights + (added if ".experts." in name else 0)
    return Base(
        architecture=arch, linears=sum(layers.values()) + nested, linear_weights=weights,
        expert_weights=expert_weights, layer=max((size for name, size in layers.items() if name), default=0),
        nested=nested, embeddings=embeddings, head=head, other=other, load_extra=extra,
        embedding_dtype=embedding_dtype, tokenizer_file=tokenizer_file, exact=exact,
        in_4_bits=any(name.endswith(_TABLES) for name in tensors), int8_embeddings=int8,
        linear_names=linear_names,
    )  # fmt: skip


def _table_bytes(tensor: StoredTensor, last: str, int8: bool) -> int:
    """Of embeddings or head; learned positions (wpe) stay as they are stored."""
    return int8_bytes(tensor.shape) if int8 and last != "wpe" else tensor.nbytes


def _skipped(module: str, quant: QuantConfig) -> bool:
    return any(module == name or module.endswith("." + name) for name in quant.skip_modules)


def _gguf_config(fields: dict[str, Any], tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """llama.cpp's header as transformers' config."""
    family = str(fields.get("general.architecture", ""))

    def field(name: str) -> Any:
        return fields.get(f"{family}.{name}")

    embedding = tensors.get("token_embd.weight")
    return {
        "model_type": family, "hidden_size": field("embedding_length"), "num_hidden_layers": field("block_count"),
        "intermediate_size": field("feed_forward_length"), "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"), "head_dim": field("attention.key_length"),
        "vocab_size": embedding.shape[0] if embedding else field("vocab_size"),
        "tie_word_embeddings": "output.weight" not in tensors, "dtype": embedding.dtype if embedding else "bfloat16",
        "max_position_embeddings": field("context_length"),
    }  # fmt: skip
