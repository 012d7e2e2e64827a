"""Llamas of any size with random 4-bit weights, straight to bitsandbytes' format: for memory and speed only."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from halfbyte.checkpoint.shard_writer import write_shards
from halfbyte.cli.demo import smollm2_path
from halfbyte.model.hf_config import HalfbyteConfig
from halfbyte.model.load import skeleton
from halfbyte.model.source import Source, load_tokenizer
from halfbyte.model.targets import modules_to_quantize
from halfbyte.quant import QuantizedWeight
from halfbyte.quant.blocks import NESTED_BLOCKSIZE, num_blocks, num_code_bytes

SHAPES = {
    "llama-135m": (576, 1536, 30, 9, 3, 49152), "llama-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-3b": (3072, 8192, 28, 24, 8, 128256), "llama-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-10b": (4096, 14336, 48, 32, 8, 49152),
    "llama-70b": (8192, 28672, 80, 64, 8, 128256),
}  # fmt: skip
"""hidden, intermediate, layers, heads, key-value heads, vocabulary: of SmolLM2 and the Llama 3 family."""
SCALE = 0.03
"""Of a block; with codes of all kinds alike the weights' standard deviation is about half."""


def config_of(shape: str) -> LlamaConfig:
    """The config of a shape's name."""
    hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=shape not in ("llama-8b", "llama-70b"),
        max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5, dtype="bfloat16",
        bos_token_id=1, eos_token_id=2, pad_token_id=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


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


def write_model(folder: Path, config: LlamaConfig) -> None:
    """A folder that halfbyte and bitsandbytes load, one tensor in memory at a time.

    Exits if the disk has no room for it.
    """
    model = skeleton(Source(label=str(folder), path=folder, config=config, stored_quantization=None))
    targets = set(modules_to_quantize(model, ()))
    needed = sum(p.numel() // 2 * 33 // 32 if n.rpartition(".")[0] in targets else 2 * p.numel() for n, p in
                 model.named_parameters())  # fmt: skip
    free = shutil.disk_usage(folder.parent).free
    if free < needed + 2**30:
        sys.exit(f"{folder.parent} has {free / 1e9:.1f} GB free, the model needs {needed / 1e9:.1f} GB and some room")
    generator = np.random.SFC64(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0] in targets:
                weight = random_weight(tuple(parameter.shape), generator)
                yield name, weight.codes.view(-1, 1)
                yield from ((f"{name}.{key}", tensor) for key, tensor in weight.bnb_tensors().items())
            elif parameter.dim() == 1:
                yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
            else:
                block = torch.randn(4096, parameter.shape[1]).mul_(0.02).bfloat16()
                yield name, block.repeat(-(-parameter.shape[0] // 4096), 1)[: parameter.shape[0]]

    settings = HalfbyteConfig(
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, blocksize=64, llm_int8_skip_modules=["lm_head"]
    ).resolve(skip_modules=["lm_head"], model_dtype=torch.bfloat16)
    config.quantization_config = settings.to_dict()
    folder.mkdir()
    write_shards(folder, tensors(), header_bytes=2**19)
    config.save_pretrained(folder)
    load_tokenizer(smollm2_path()).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    write_model(options.folder, config_of(options.shape))
    size = sum(file.stat().st_size for file in options.folder.iterdir())
    print(f"{options.folder}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
