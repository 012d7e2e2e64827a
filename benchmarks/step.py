"""One stack's LoRA training step in a process of its own: prints one JSON line. `bench_step.py` runs it in turn.

usage: step.py STACK MODEL_DIR BATCH TOKENS STEPS

STACK: halfbyte | peft (LoRA on unquantized weights) | bitsandbytes | fork (bitsandbytes-cpu-fork) | torchao (its
NF4Tensor), then -fp32 or -bf16 for the compute dtype, then -checkpoint for gradient checkpointing. Sequences of one
length, every token supervised, r=16 on all linear layers, AdamW; the first step is not counted. Every stack sees the
same random tokens.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

Step = Callable[[], torch.Tensor]


def halfbyte_step(
    path: str, dtype: torch.dtype, ids: torch.Tensor, stack: ExitStack, *, checkpoint: bool, r: int = 16
) -> tuple[Any, Step]:
    """The trainer's own pieces: load, attach, objective, reused buffers; open until `stack` is closed."""
    from halfbyte.config import LoraConfig, QuantConfig
    from halfbyte.data import Batch
    from halfbyte.kernels.buffers import steady_memory
    from halfbyte.model import load_model
    from halfbyte.model.adapt import attach_lora
    from halfbyte.train.objective import Objective

    loaded = load_model(path, QuantConfig(), compute_dtype=dtype)
    model = attach_lora(loaded.model, LoraConfig(r=r, lora_alpha=2 * r), seed=0).train()
    if checkpoint:
        loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = Objective(loaded.model)
    stack.enter_context(steady_memory())
    stack.enter_context(objective.ready())
    rows, length = ids.shape
    labels = ids.clone()
    labels[:, 0] = -100
    batch = Batch(
        input_ids=ids.reshape(1, -1), labels=labels.reshape(1, -1),
        position_ids=torch.arange(length).repeat(rows).unsqueeze(0),
        seq_starts=torch.arange(0, ids.numel() + 1, length, dtype=torch.int32),
        num_targets=rows * (length - 1), num_tokens=ids.numel(),
    )  # fmt: skip
    return model, lambda: objective.loss_sum(batch) / batch.num_targets


def to_nf4tensors(model: Any) -> None:
    """Every linear layer but the head in torchao's NF4. Blocks of 64 scales: 256 do not divide SmolLM2's shapes."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    for layer_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and layer_name != "lm_head":
            module.weight = torch.nn.Parameter(to_nf4(module.weight.detach(), 64, 64), requires_grad=False)


def peer_step(path: str, dtype: torch.dtype, ids: torch.Tensor, *, name: str, checkpoint: bool) -> tuple[Any, Step]:
    """transformers + PEFT, with a quantizer underneath or not, as their documentation has it."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {}
    quantized = name in ("bitsandbytes", "fork")  # one name to import; the interpreter says which it is
    if quantized:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **settings)
    if name == "torchao":
        to_nf4tensors(model)
    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpoint)
    elif checkpoint:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    return model, lambda: model(input_ids=ids, labels=ids).loss


def main() -> None:
    """Run the steps and print the figures."""
    with ExitStack() as opened:
        print(json.dumps(measure(opened)))


def measure(opened: ExitStack) -> dict[str, Any]:
    """The figures of the stack that the command line names."""
    stack, path, *counts = sys.argv[1:6]
    batch, tokens, steps = map(int, counts)
    name, dtype_name, *rest = stack.split("-")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    checkpoint = rest == ["checkpoint"]
    ids = torch.randint(0, 30000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    if name == "halfbyte":
        model, loss_of = halfbyte_step(path, dtype, ids, opened, checkpoint=checkpoint)
    else:
        model, loss_of = peer_step(path, dtype, ids, name=name, checkpoint=checkpoint)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    seconds, losses = [], []
    for _ in range(steps + 1):
        started = time.perf_counter()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
    median = statistics.median(seconds[1:])
    return {
        "stack": stack,
        "seconds": median,
        "tokens_per_s": batch * tokens / median,
        "losses": losses,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
