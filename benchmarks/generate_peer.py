"""One stack generates at batch 1. Prints one JSON line. usage: generate_peer.py STACK FOLDER THREADS"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

PROMPT, SHORT, NEW = 512, 32, 64
LONGEST = 15.0
"""Seconds after which no more tokens are written: the slow stacks on the 1B shape."""


def halfbyte(folder: str, stack: str) -> tuple[Callable[[list[int]], Any], Callable[[int], Any]]:
    """Prompt and step of halfbyte's decoder, tried out; the stack's name says the head or the compute dtype."""
    from halfbyte.config import QuantConfig
    from halfbyte.model import load_model
    from halfbyte.model.decode import Decoder

    quant = QuantConfig(embeddings="int8" if stack == "halfbyte-int8" else "as_stored")
    dtype = torch.bfloat16 if stack == "halfbyte-bf16" else torch.float32
    decoder = Decoder(load_model(folder, quant, compute_dtype=dtype).model)
    decoder.try_out([1, 2, 3])
    return decoder.prefill, decoder.step


def transformers(folder: str, quantized: bool) -> tuple[Callable[[list[int]], Any], Callable[[int], Any]]:
    """Prompt and step of the model's own forward, in fp32; without generate()'s work around it."""
    options: dict[str, Any] = {}
    if quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    cache = DynamicCache()

    def forward(ids: list[int]) -> Any:
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    def prefill(ids: list[int]) -> Any:
        nonlocal cache
        cache = DynamicCache()
        return forward(ids)

    return prefill, lambda token: forward([token])


@torch.no_grad()
def main() -> None:
    stack, folder, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    if stack.startswith("halfbyte"):
        prefill, step = halfbyte(folder, stack)
    else:
        prefill, step = transformers(folder, stack == "bitsandbytes")
    ids = [i * 7919 % 49000 + 5 for i in range(PROMPT)]
    prefill(ids)
    started = time.perf_counter()
    prefill(ids)
    prompt_seconds = time.perf_counter() - started
    token = int(prefill(ids[:SHORT]).argmax())
    for _ in range(4):
        token = int(step(token).argmax())
    started, seconds, count = time.perf_counter(), 0.0, 0
    while count < NEW and seconds < LONGEST:
        token = int(step(token).argmax())
        seconds, count = time.perf_counter() - started, count + 1
    print(json.dumps({"prompt_tokens_per_s": PROMPT / prompt_seconds, "tokens_per_s": count / seconds}))


main()
