"""The usual stack, transformers + PEFT + bitsandbytes, on the work of `bench_finetune.py`. Prints one JSON line.

usage: peer_stack.py MODEL TRAIN.jsonl HELD_OUT.jsonl STEPS BATCH ADAPTER_OUT

The standard recipe with nothing clever: padded batches of BATCH samples, order `torch.randperm` from seed 0, loss on
the last assistant turn, AdamW 2e-4, gradient norm 0.3. fp32 compute.

On CPUs with AVX512_BF16, bitsandbytes 0.50 repacks a layer at its first inference and rounds its scales to bfloat16;
after that the layer has no gradient. The flag that this hangs on is switched off here, so that the peer can train.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def read(path: str, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(token ids, labels) of each conversation."""
    samples = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        start = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        samples.append((ids, [-100] * len(start) + ids[len(start) :]))
    return samples


def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """One padded batch."""
    longest = max(len(ids) for ids, _ in rows)

    def pad(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    return {
        "input_ids": pad([ids for ids, _ in rows], 0),
        "labels": pad([labels for _, labels in rows], -100),
        "attention_mask": pad([[1] * len(ids) for ids, _ in rows], 0),
    }


def main() -> None:
    """Train, evaluate before and after, save the adapter."""
    path, train_file, held_out_file, steps, batch, output = sys.argv[1:7]
    tokenizer = AutoTokenizer.from_pretrained(path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=quantization)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    data, held_out = read(train_file, tokenizer), read(held_out_file, tokenizer)

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        total, count = 0.0, 0
        for start in range(0, len(held_out), 8):
            inputs = collate(held_out[start : start + 8])
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs).logits[:, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += int((labels != -100).sum())
        model.train()
        return total / count

    before = evaluate()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = supervised = 0
    started = time.perf_counter()
    for step in range(int(steps)):
        rows = [data[order[(step * int(batch) + i) % len(order)]] for i in range(int(batch))]
        inputs = collate(rows)
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(inputs["attention_mask"].sum())
        supervised += int((inputs["labels"][:, 1:] != -100).sum())
    seconds = time.perf_counter() - started
    model.save_pretrained(output)
    print(json.dumps({
        "eval_loss_before": before, "eval_loss": evaluate(), "seconds": seconds, "tokens_per_s": tokens / seconds,
        "supervised_tokens_per_s": supervised / seconds,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }))  # fmt: skip


main()
