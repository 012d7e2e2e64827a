"""AdamW's moments in pages on disk, and in 8 bits.

    python benchmarks/bench_optim.py [paged] [alone] [bits] [--steps 8] [--rank 64] [--demo-steps 200]

paged: whole training steps of SmolLM2-135M, one micro-batch of 2 x 512 tokens, adapters on all linear layers, a tenth
of the moments in memory. A paged and an unpaged run take turns, step by step in one process; ratios are of neighbours.
alone: the optimizer's step by itself, for one parameter with as many elements, which shows what the disk costs.
bits: `halfbyte demo` with optim.bits 32 and 8: held-out loss, and the moments' bytes in a checkpoint of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import halfbyte, smollm2_folder, write_result
from safetensors import safe_open
from step import halfbyte_step

from halfbyte import AdamW

PARTS = ("paged", "alone", "bits")
BATCH, TOKENS = 2, 512


def bench_paged(options: argparse.Namespace, bits: int, opened: ExitStack) -> dict[str, Any]:
    """Seconds of whole steps and of the optimizer's part, and whether both runs stay the same to the bit."""
    ids = torch.randint(0, 30000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.compute]
    path = str(smollm2_folder(options.work / "smollm2"))
    model, loss_of = halfbyte_step(path, dtype, ids, opened, checkpoint=False, r=options.rank)
    params = [param for param in model.parameters() if param.requires_grad]
    state_bytes = sum(param.numel() for param in params) * {32: 8, 8: 2}[bits]
    optimizers = {
        "unpaged": AdamW(params, lr=1e-4, bits=bits),
        "paged": AdamW(params, lr=1e-4, bits=bits, paged=True, budget=state_bytes // 10, offload_dir=options.work),
    }
    where = optimizers["paged"].reserve()
    values = {kind: [param.detach().clone() for param in params] for kind in optimizers}
    losses: dict[str, list[float]] = {kind: [] for kind in optimizers}
    whole, part = ({kind: list[float]() for kind in optimizers} for _ in range(2))
    for step in range(options.steps + 1):
        for kind in sorted(optimizers, reverse=step % 2 == 1):
            torch._foreach_copy_([param.detach() for param in params], values[kind])
            began = time.perf_counter()
            loss = loss_of()
            loss.backward()
            before = time.perf_counter()
            optimizers[kind].step()
            optimizers[kind].zero_grad()
            ended = time.perf_counter()
            torch._foreach_copy_(values[kind], [param.detach() for param in params])
            losses[kind].append(float(loss.detach()))
            if step:  # the first one takes memory
                whole[kind].append(ended - began)
                part[kind].append(ended - before)
    same = losses["paged"] == losses["unpaged"] and all(map(torch.equal, values["paged"], values["unpaged"]))
    return {
        "parameters": sum(param.numel() for param in params), "state_bytes": state_bytes, "budget": state_bytes // 10,
        "where": where, "bit_identical": same,
        "step_seconds": {kind: statistics.median(times) for kind, times in whole.items()},
        "optimizer_seconds": {kind: statistics.median(times) for kind, times in part.items()},
        "least_optimizer_seconds": {kind: min(times) for kind, times in part.items()},
        "step_ratio": statistics.median(a / b for a, b in zip(whole["paged"], whole["unpaged"], strict=True)),
    }  # fmt: skip


def bench_alone(options: argparse.Namespace, bits: int, numel: int = 19_537_920) -> dict[str, float]:
    """Seconds of the optimizer's step, the least of 20 of each kind in turn."""
    param = torch.nn.Parameter(torch.zeros(numel))
    param.grad = torch.randn(numel)
    budget = numel * {32: 8, 8: 2}[bits] // 10
    kinds = {
        "unpaged": AdamW([param], bits=bits),
        "paged": AdamW([param], bits=bits, paged=True, budget=budget, offload_dir=options.work),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(21):
        for kind, optimizer in kinds.items():
            time.sleep(0.1)  # as long as a training step has for what is behind and ahead
            began = time.perf_counter()
            optimizer.step()
            seconds[kind].append(time.perf_counter() - began)
    return {kind: min(times[1:]) for kind, times in seconds.items()}


def bench_bits(options: argparse.Namespace) -> dict[str, Any]:
    """The demo with moments in 32 and in 8 bits."""
    rows: dict[str, Any] = {}
    for bits in (32, 8):
        output = options.work / f"demo-{bits}"
        done = output / "result.json"
        result = json.loads(done.read_text()) if done.exists() else {}
        if result.get("steps") != options.demo_steps:  # a finished run in --work is taken as it is
            result = halfbyte(
                "demo", "--output", str(output), "--steps", str(options.demo_steps), "--set", "train.resume=never",
                "--set", f"optim.bits={bits}", "--set", f"train.save_every={options.demo_steps}",
            )  # fmt: skip
        checkpoint = output / f"checkpoint-{options.demo_steps}" / "optimizer.safetensors"
        with safe_open(checkpoint, "pt") as file:
            size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
        rows[str(bits)] = {
            "held_out_loss": result["eval_loss"], "before": result["eval_loss_before"],
            "train_loss": result["train_loss"], "moment_bytes": size,
        }  # fmt: skip
    return {
        "steps": options.demo_steps, "bits": rows,
        "loss_difference": rows["8"]["held_out_loss"] / rows["32"]["held_out_loss"] - 1,
        "bytes_ratio": rows["8"]["moment_bytes"] / rows["32"]["moment_bytes"],
    }  # fmt: skip


def main() -> None:
    """Run the parts asked for, print them, and put them beside those that are stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=PARTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--compute", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--demo-steps", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "optim.json")
    options = parser.parse_args()
    options.parts = options.parts or PARTS
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    if "paged" in options.parts:
        found["paged"] = {
            "model": "SmolLM2-135M", "tokens": BATCH * TOKENS, "r": options.rank, "compute": options.compute,
        }  # fmt: skip
        for bits in (32, 8):
            with ExitStack() as opened:
                found["paged"][f"{bits}-bit"] = bench_paged(options, bits, opened)
    if "alone" in options.parts:
        found["alone"] = {f"{bits}-bit": bench_alone(options, bits) for bits in (32, 8)}
    if "bits" in options.parts:
        found["bits"] = bench_bits(options)
    results = {part: found[part] for part in PARTS if part in found}
    print(json.dumps(results, indent=1), file=sys.stderr)
    write_result(options.output, results)


if __name__ == "__main__":
    main()
