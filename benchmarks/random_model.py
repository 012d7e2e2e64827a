"""Models of any size with random 4-bit weights, straight to bitsandbytes' format: for memory and speed only."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from halfbyte.checkpoint.shard_writer import write_shards
from halfbyte.cli.demo import smollm2_path
from halfbyte.model.hf_config import HalfbyteConfig
from halfbyte.model.load import skeleton
from halfbyte.model.source import Source, load_tokenizer
from halfbyte.model.targets import modules_to_quantize
from halfbyte.quant import QuantizedWeight
from halfbyte.quant.blocks import NESTED_BLOCKSIZE, num_blocks, num_code_bytes

LLAMA = {"model_type": "llama", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-135m": LLAMA | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                           "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152},
    "qwen3-360m": {"model_type": "qwen3", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 24,
                   "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49152},
    "qwen2-500m": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                   "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
    "gemma3-1b": {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
                  "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 131072},
    "llama-1b": LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                         "num_attention_heads": 32, "head_dim": 64},
    "llama-3b": LLAMA | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                         "num_attention_heads": 24},
    "llama-8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                         "num_attention_heads": 32, "tie_word_embeddings": False},
    "llama-10b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 48,
                          "num_attention_heads": 32, "vocab_size": 49152},
    "llama-70b": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                          "num_attention_heads": 64, "tie_word_embeddings": False},
}  # fmt: skip
"""Of SmolLM2, the Llama 3 family and others; vocabularies of at least SmolLM2's, whose tokenizer they are given."""
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma3"}
SCALE = 0.03
"""Of a block; with codes of all kinds alike the weights' standard deviation is about half."""


def config_of(shape: str) -> PreTrainedConfig:
    """The config of a shape's name."""
    settings = {
        "tie_word_embeddings": True, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    } | SHAPES[shape]  # fmt: skip
    config = AutoConfig.for_model(**settings)
    config.dtype, config.architectures = torch.bfloat16, [CLASSES[config.model_type] + "ForCausalLM"]
    return config


def random_weight(shape: tuple[int, ...], generator: np.random.SFC64) -> QuantizedWeight:
    """Codes of any value, scales near SCALE."""
    count = prod(shape)
    blocks = num_blocks(count, 64)
    return QuantizedWeight(
        codes=_random_bytes(num_code_bytes(count), generator), absmax=_random_bytes(blocks, generator),
        nested_absmax=torch.full((num_blocks(blocks, NESTED_BLOCKSIZE),), SCALE / 3), nested_offset=SCALE,
        quant_type="nf4", blocksize=64, shape=tuple(shape), dtype=torch.bfloat16,
    )  # fmt: skip


def _random_bytes(count: int, generator: np.random.SFC64) -> Tensor:
    return torch.from_numpy(generator.random_raw(-(-count // 8)).view(np.uint8)[:count])


def write_model(
    folder: Path, config: PreTrainedConfig, *, in_4_bits: bool = True, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """A folder that halfbyte and bitsandbytes load, one tensor in memory at a time.

    Args:
        in_4_bits: the linear layers; else they are in bfloat16, as everything else is.
        tokenizer: default: SmolLM2's.

    Exits if the disk has no room for it.
    """
    model = skeleton(Source(label=str(folder), path=folder, config=config, stored_quantization=None))
    targets = set(modules_to_quantize(model, ())) if in_4_bits else set()
    tied = set(model.all_tied_weights_keys)
    parameters = {name: value for name, value in model.named_parameters() if name not in tied}
    needed = sum(value.numel() // 2 * 33 // 32 if name.rpartition(".")[0] in targets else 2 * value.numel()
                 for name, value in parameters.items())  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed + 2**30:
        sys.exit(f"{folder.parent} has {free / 1e9:.1f} GB free, the model needs {needed / 1e9:.1f} GB and some room")
    generator = np.random.SFC64(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in parameters.items():
            if name.rpartition(".")[0] in targets:
                weight = random_weight(tuple(parameter.shape), generator)
                yield name, weight.codes.view(-1, 1)
                yield from ((f"{name}.{key}", tensor) for key, tensor in weight.bnb_tensors().items())
            elif parameter.dim() == 1:
                yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
            else:
                block = torch.randn(4096, parameter.shape[1]).mul_(0.02).bfloat16()
                yield name, block.repeat(-(-parameter.shape[0] // 4096), 1)[: parameter.shape[0]]

    if in_4_bits:
        settings = HalfbyteConfig(
            bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, blocksize=64, llm_int8_skip_modules=["lm_head"]
        ).resolve(skip_modules=["lm_head"], model_dtype=torch.bfloat16)
        config.quantization_config = settings.to_dict()
    folder.mkdir()
    write_shards(folder, tensors(), header_bytes=2**19)
    config.save_pretrained(folder)
    (tokenizer or load_tokenizer(smollm2_path())).save_pretrained(folder)


def model_folder(
    folder: Path, shape: str, *, in_4_bits: bool = True, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """The model of this shape in `folder`, made if it is not there yet, and never half there."""
    if not folder.exists():
        started = time.perf_counter()
        beside = folder.with_name(folder.name + ".part")
        shutil.rmtree(beside, ignore_errors=True)
        write_model(beside, config_of(shape), in_4_bits=in_4_bits, tokenizer=tokenizer)
        beside.rename(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {size / 1e9:.2f} GB written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    model_folder(options.folder, options.shape)


if __name__ == "__main__":
    main()
