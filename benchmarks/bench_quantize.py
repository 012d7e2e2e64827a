"""Peak memory and speed of `halfbyte quantize` on a 2 GB bf16 model of random weights.

usage: bench_quantize.py [--work DIR]

The promise: peak resident memory below the size of the output plus 300 MB, everything loaded included.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from common import halfbyte, write_result
from torch import Tensor
from transformers import LlamaConfig

from halfbyte.checkpoint import write_folder
from halfbyte.checkpoint.shard_writer import write_shards
from halfbyte.cli.demo import smollm2_path
from halfbyte.model.source import load_tokenizer

CONFIG = LlamaConfig(
    vocab_size=49152, hidden_size=2048, intermediate_size=6144, num_hidden_layers=18, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
)  # fmt: skip


def weights() -> Iterator[tuple[str, Tensor]]:
    """Random weights under Llama's names, one at a time."""
    h, f, kv = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.hidden_size // 4
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (CONFIG.vocab_size, h),
        "model.norm.weight": (h,),
    }
    for i in range(CONFIG.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + f"self_attn.{n}_proj.weight": (o, h) for n, o in (("q", h), ("k", kv), ("v", kv), ("o", h))}
        shapes |= {layer + f"mlp.{n}_proj.weight": s for n, s in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f)))}
        shapes |= {layer + f"{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    for name, shape in shapes.items():
        yield name, (torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02).bfloat16()


def main() -> None:
    """Make the model, quantize it, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    work = parser.parse_args().work
    model, output = work / "random-2gb", work / "random-2gb-4bit"
    if not model.exists():
        with write_folder(model) as writer:
            write_shards(writer.path, weights())
            CONFIG.save_pretrained(writer.path)
            load_tokenizer(smollm2_path()).save_pretrained(writer.path)
    if output.exists():
        shutil.rmtree(output)
    result = halfbyte("quantize", "--model", str(model), "--output", str(output))
    over = result["peak_memory"] - result["bytes_out"]
    print(
        f"{result['bytes_in'] / 1e9:.2f} GB -> {result['bytes_out'] / 1e9:.2f} GB in {result['seconds']:.1f} s "
        f"({result['bytes_in'] / 1e9 / result['seconds']:.2f} GB/s); peak {result['peak_memory'] / 1e6:.0f} MB, "
        f"{over / 1e6:+.0f} MB against the output (the promise: below +300)"
    )
    write_result(Path(__file__).parent / "results" / "quantize.json", {**result, "over_output": over})


main()
