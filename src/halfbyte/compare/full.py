"""Full fine-tuning of all weights in float32, by transformers and torch alone: what adapters are compared with.

python -m halfbyte.compare.full OUTPUT SECTION.KEY=VALUE...: a process of its own, since it needs 16 bytes a parameter.
The same batches in the same order as `halfbyte train` with these settings; a tenth of their learning rate.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from halfbyte.config import RunConfig, load_config
from halfbyte.data import IGNORE_INDEX, Batch, eval_batches, load_data, to_padded
from halfbyte.dtypes import format_bytes, parse_bytes
from halfbyte.errors import HalfbyteError, ResourceError
from halfbyte.model.load import skeleton
from halfbyte.model.memory import free_memory, peak_memory
from halfbyte.model.source import load_tokenizer, locate, open_source
from halfbyte.optim import learning_rate
from halfbyte.train.planning import make_loader, steps_of

LR_SHARE = 0.1
"""Of the adapters' learning rate: what moves all weights has to move them less."""
BYTES_PER_PARAMETER = 16
"""Weight, gradient and two moments, each in 4 bytes."""


def train_full(run: RunConfig, output: Path) -> dict[str, Any]:
    """Train, write OUTPUT/metrics.jsonl; the figures that `halfbyte train --json` has.

    Raises:
        ResourceError: it does not fit into free memory or the budget.
    """
    started = time.perf_counter()
    _check_fits(run)
    torch.manual_seed(run.train.seed)
    tokenizer = load_tokenizer(run.model.path)
    data = load_data(run.data.train, tokenizer, run.data)
    held_out = load_data(run.data.eval, tokenizer, run.data)
    local = locate(run.model.path)
    folder, gguf = (local.parent, {"gguf_file": local.name}) if local.is_file() else (local, {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **gguf)
    optim = run.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr * LR_SHARE, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    loader = make_loader(run, data)
    steps, cursor = steps_of(run, loader), loader.start()
    before, tokens, targets, spent, lines = _evaluate(model, held_out, run), 0, 0, 0.0, []
    for step in range(1, steps + 1):
        step_started = time.perf_counter()
        batches = []
        for _ in range(run.train.gradient_accumulation_steps):
            batch, cursor = loader.next_batch(cursor)
            batches.append(batch)
        count = sum(batch.num_targets for batch in batches)
        loss = 0.0
        for batch in batches:
            part = _loss_sum(model, batch) / count
            part.backward()
            loss += float(part.detach())
        if optim.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = LR_SHARE * learning_rate(
                step, lr=optim.lr, schedule=optim.schedule, warmup_steps=optim.warmup_steps, steps=steps
            )
        optimizer.step()
        optimizer.zero_grad()
        spent += time.perf_counter() - step_started
        tokens, targets = tokens + sum(b.num_tokens for b in batches), targets + count
        lines.append(json.dumps({"event": "step", "step": step, "loss": loss}))
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "steps": steps, "eval_loss_before": before, "eval_loss": _evaluate(model, held_out, run),
        "tokens_per_s": tokens / spent, "supervised_tokens_per_s": targets / spent,
        "seconds": time.perf_counter() - started, "peak_memory": peak_memory(), "answers": [],
        "base_bytes": 4 * sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def _check_fits(run: RunConfig) -> None:
    needed = BYTES_PER_PARAMETER * sum(p.numel() for p in skeleton(open_source(run.model.path)).parameters())
    allowed = parse_bytes(run.memory.budget) if run.memory.budget else free_memory()
    if needed > allowed:
        raise ResourceError(
            f"full fine-tuning needs {format_bytes(needed)} for weights, gradients and moments alone, "
            f"{format_bytes(allowed)} are allowed"
        )


def _loss_sum(model: nn.Module, batch: Batch) -> torch.Tensor:
    padded = to_padded(batch)
    logits = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), padded.labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


@torch.no_grad()
def _evaluate(model: nn.Module, data: Any, run: RunConfig) -> float:
    model.eval()
    total, targets = 0.0, 0
    for batch in eval_batches(data, run.data.max_seq_len):
        total += float(_loss_sum(model, batch))
        targets += batch.num_targets
    model.train()
    return total / targets


def main() -> int:
    """Run it; an error is one line, with its exit code."""
    try:
        sys.stdout.write(json.dumps(train_full(load_config(None, sys.argv[2:]), Path(sys.argv[1]))) + "\n")
    except HalfbyteError as error:
        sys.stderr.write(f"halfbyte: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
