"""The models of bench_generate.py: as folders for the Python stacks, and in Q4_0 for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from common import llama_1b_folder, smollm2_folder
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.cli.demo import smollm2_path

MODELS = ("smollm2", "llama-1b")


def folder(name: str, work: Path) -> Path:
    """A bf16 safetensors folder of SmolLM2-135M, or of random weights in the shape of Llama-3.2-1B."""
    if name == "smollm2":
        return smollm2_folder(work / name)
    return llama_1b_folder(work / name)


def q4_0(source: Path, path: Path) -> Path:
    """Q4_0 as llama.cpp's own quantizer makes it: matrices in Q4_0, the tied embedding in Q8_0 or Q6_K.

    The embedding is Q8_0 here (llama.cpp takes Q6_K where 256 divides the rows; gguf cannot write that).
    """
    if path.exists():
        return path
    if source.name == "smollm2":
        _requantize(path)
    else:
        _from_folder(source, path)
    return path


def _requantize(path: Path) -> None:
    reader, writer = gguf.GGUFReader(smollm2_path()), gguf.GGUFWriter(path, "llama")
    _copy_fields(reader, writer)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        _add(writer, tensor.name, values)
    _finish(writer)


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, prefix: str = "", vocab_size: int = 0) -> None:
    """The fields whose names begin with `prefix`; unused tokens are added up to `vocab_size`."""
    unused = {"tokenizer.ggml.tokens": "<unused {}>", "tokenizer.ggml.token_type": int(gguf.TokenType.UNUSED)}
    for field in reader.fields.values():
        if not field.name.startswith(prefix) or field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = 2 if field.name == "general.file_type" else field.contents()
        if (filler := unused.get(field.name)) is not None:
            more = range(len(value), vocab_size)
            value += [filler.format(n) if isinstance(filler, str) else filler for n in more]
        writer.add_key_value(field.name, value, kind, sub_type=element)


def _from_folder(source: Path, path: Path) -> None:
    """With SmolLM2's tokenizer, filled up: llama.cpp's server wants one, though prompts are token ids."""
    config = LlamaConfig.from_pretrained(source)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _copy_fields(gguf.GGUFReader(smollm2_path()), writer, "tokenizer.ggml.", config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for name, tensor in model.named_parameters():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        _add(writer, found, tensor.detach().float().numpy())
    _finish(writer)


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
    kind = Type.F32 if values.ndim == 1 else Type.Q8_0 if name == "token_embd.weight" else Type.Q4_0
    writer.add_tensor(name, gguf.quants.quantize(values, kind) if kind != Type.F32 else values, raw_dtype=kind)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
