"""bitsandbytes + PEFT's training step on a GPU in a process of its own: prints one JSON line (bench_gpu_train.py).

usage: gpu_peer.py MODEL_DIR BATCH TOKENS STEPS CHECKPOINTING

The standard recipe: the 4-bit folder through `from_pretrained`, LoRA r=16 on all linear layers, bfloat16 autocast as
`Trainer(bf16=True)` has it, torch's fused AdamW, gradients clipped; random tokens, every one of them learned.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch


def main() -> None:
    """Run the steps and print the figures."""
    import peft
    from transformers import AutoModelForCausalLM

    path, *counts = sys.argv[1:6]
    batch, tokens, steps, checkpointing = map(int, counts)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map={"": 0})
    torch.manual_seed(0)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    seconds, losses = [], []
    for _ in range(steps):
        ids = torch.randint(0, 256, (batch, tokens), generator=generator).cuda()
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))
    median = statistics.median(seconds[3:])  # the first steps fill the allocator
    print(json.dumps({
        "seconds_per_step": median, "tokens_per_s": batch * tokens / median, "losses": [losses[0], losses[-1]],
        "peak_tensors": torch.cuda.max_memory_allocated(), "peak_taken": torch.cuda.max_memory_reserved(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
