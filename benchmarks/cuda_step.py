"""One stack's LoRA step on a GPU in a process of its own: prints one JSON line. `bench_cuda.py` runs it.

usage: cuda_step.py STACK MODEL_DIR BATCH TOKENS STEPS

STACK: halfbyte (HALFBYTE_CUDA_KERNELS says with which kernels) | bitsandbytes. The standard recipe for both:
`from_pretrained` with a quantization_config, PEFT's LoRA r=16 on all linear layers, AdamW; bfloat16; random tokens.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch


def main() -> None:
    """Run the steps and print the figures."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from halfbyte import HalfbyteConfig

    stack, path, *counts = sys.argv[1:6]
    batch, tokens, steps = map(int, counts)
    make: Any = HalfbyteConfig if stack == "halfbyte" else BitsAndBytesConfig
    config = make(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=config, device_map={"": 0}
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, weight_decay=0.0)
    ids = torch.randint(0, 30000, (batch, tokens), generator=torch.Generator().manual_seed(0)).cuda()
    seconds, losses = [], []
    for _ in range(steps + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))
    median = statistics.median(seconds[3:])  # the first steps compile kernels and fill the allocator
    print(json.dumps({
        "seconds": median, "tokens_per_s": batch * tokens / median, "losses": losses,
        "peak_memory": torch.cuda.max_memory_allocated(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
