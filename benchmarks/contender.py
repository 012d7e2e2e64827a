"""One contender of bench_kernels.py and bench_linear.py, in a process of its own.

usage: contender.py halfbyte|dense|openblas|bitsandbytes|torchao

A line of JSON in: {"task", "rows", "cols", "m"}, a weight (rows, cols) and m rows of x; a line out: {"seconds"} of one
run after sweeping the caches, which follows one that is not timed, or {"cannot": why}. Tasks: quantize; dequantize to
fresh memory; dequantize into a given buffer; forward; forward+backward to x; layer (forward and backward with an
adapter of rank 16). float32, NF4 in blocks of 64 with double quantization (quantize: without, as bitsandbytes' own
benchmark has it).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

RANK = 16
Run = Callable[[], object]


@cache
def weight(rows: int, cols: int) -> Any:
    """The weight, the same for everyone that uses torch."""
    import torch

    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02


def adapted(base: Any) -> Any:
    """PEFT's adapter on `base`, inside a Sequential."""
    import peft
    import torch

    model = peft.get_peft_model(torch.nn.Sequential(base), peft.LoraConfig(r=RANK, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@cache
def inputs(m: int, cols: int, rows: int) -> tuple[Any, Any]:
    """x (m, cols) and the gradient of its product (m, rows)."""
    import torch

    return torch.randn(m, cols), torch.randn(m, rows)


def trained(layer: Any, x: Any, grad: Any) -> Run:
    """Forward and backward of a module, the gradients dropped again."""
    leaf = x.detach().requires_grad_()

    def run() -> None:
        layer(leaf).backward(grad)
        leaf.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    return run


class Halfbyte:
    """Our operators; HALFBYTE_ISA chooses the code."""

    def __init__(self, rows: int, cols: int) -> None:
        from halfbyte import quantize

        self.weight = weight(rows, cols)
        self.quantized = quantize(self.weight)

    def quantize(self) -> Run:
        import torch

        return lambda: torch.ops.halfbyte.quantize_4bit(self.weight, "nf4", 64)

    def dequantize(self) -> Run:
        import torch

        return lambda: self.quantized.dequantize(torch.float32)

    def dequantize_into(self) -> Run:
        import torch

        from halfbyte.kernels.cpu import WeightView
        from halfbyte.kernels.registry import cpu_choice

        library = cpu_choice().library
        if library is None:
            raise NotImplementedError("no native library")
        out, view = torch.empty_like(self.weight), WeightView(*self.quantized.op_args, tuple(self.weight.shape))
        return lambda: view.dequantize_into(library, out)

    def forward(self, x: Any) -> Run:
        import torch

        return lambda: torch.ops.halfbyte.linear_4bit(x, *self.quantized.op_args, self.weight.shape[0], None)

    def both(self, x: Any, grad: Any) -> Run:
        import torch

        forward, cols = self.forward(x), self.weight.shape[1]
        return lambda: (forward(), torch.ops.halfbyte.linear_4bit_dx(grad, *self.quantized.op_args, cols))

    @cached_property
    def layer(self) -> Any:
        from halfbyte.nn import Linear4bit
        from halfbyte.nn.lora_linear import fuse_lora_layers

        model = adapted(Linear4bit.from_weight(self.weight))
        assert fuse_lora_layers(model) == 1
        return model.get_base_model().train()


class Dense:
    """torch on the float32 weight."""

    def __init__(self, rows: int, cols: int) -> None:
        self.weight = weight(rows, cols)

    def forward(self, x: Any) -> Run:
        return lambda: x @ self.weight.t()

    def both(self, x: Any, grad: Any) -> Run:
        return lambda: (x @ self.weight.t(), grad @ self.weight)

    @cached_property
    def layer(self) -> Any:
        import torch

        base = torch.nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False)
        base.weight = torch.nn.Parameter(self.weight, requires_grad=False)
        return adapted(base).get_base_model().train()


class Bitsandbytes:
    """bitsandbytes or its CPU fork, whichever this interpreter finds."""

    def __init__(self, rows: int, cols: int) -> None:
        import bitsandbytes

        self.bnb, self.weight = bitsandbytes, weight(rows, cols)
        self.packed, self.state = bitsandbytes.functional.quantize_4bit(
            self.weight, quant_type="nf4", compress_statistics=True
        )

    def quantize(self) -> Run:
        return lambda: self.bnb.functional.quantize_4bit(self.weight, quant_type="nf4")

    def dequantize(self) -> Run:
        return lambda: self.bnb.functional.dequantize_4bit(self.packed, self.state)

    def dequantize_into(self) -> Run:
        out = self.weight.clone()
        return lambda: self.bnb.functional.dequantize_4bit(self.packed, self.state, out=out)

    def forward(self, x: Any) -> Run:
        return lambda: self.bnb.matmul_4bit(x, self.packed.t(), quant_state=self.state)

    def both(self, x: Any, grad: Any) -> Run:
        leaf = x.detach().requires_grad_()

        def run() -> None:
            self.bnb.matmul_4bit(leaf, self.packed.t(), quant_state=self.state).backward(grad)
            leaf.grad = None

        return run

    @cached_property
    def layer(self) -> Any:
        import torch

        rows, cols = self.weight.shape
        base = self.bnb.nn.Linear4bit(
            cols, rows, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32
        )
        base.weight = self.bnb.nn.Params4bit(self.weight, requires_grad=False, quant_type="nf4")
        base = base.to("cpu")
        base.support_avx512bf16_for_cpu = False  # else it repacks at its first inference, and has no gradient then
        return adapted(base).get_base_model().train()


class Torchao:
    """torchao's NF4Tensor: the same codes, other scales."""

    def __init__(self, rows: int, cols: int) -> None:
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor

        self.nf4, self.weight = nf4_tensor, weight(rows, cols)
        self.packed = nf4_tensor.to_nf4(self.weight, 64, 256)

    def quantize(self) -> Run:
        return lambda: self.nf4.to_nf4(self.weight, 64, 256)

    def dequantize(self) -> Run:
        return lambda: self.packed.get_original_weight()

    def dequantize_into(self) -> Run:
        raise NotImplementedError("get_original_weight takes no buffer")

    def forward(self, x: Any) -> Run:
        return lambda: self.nf4.linear_nf4(x, self.packed)

    def both(self, x: Any, grad: Any) -> Run:
        leaf = x.detach().requires_grad_()

        def run() -> None:
            self.nf4.linear_nf4(leaf, self.packed).backward(grad)
            leaf.grad = None

        return run

    @cached_property
    def layer(self) -> Any:
        import torch

        base = torch.nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False)
        base.weight = torch.nn.Parameter(self.packed, requires_grad=False)
        return adapted(base).get_base_model().train()


class Openblas:
    """numpy's BLAS on the dense weight: two products, and the six of the adapter."""

    def __init__(self, rows: int, cols: int) -> None:
        import numpy as np

        draw = np.random.default_rng(0)
        self.normal = lambda *shape: draw.standard_normal(shape, dtype=np.float32)
        self.weight, self.a, self.b = self.normal(rows, cols), self.normal(RANK, cols), self.normal(rows, RANK)

    def step(self, m: int) -> Run:
        weight, a, b = self.weight, self.a, self.b
        x, grad = self.normal(m, weight.shape[1]), self.normal(m, weight.shape[0])

        def run() -> None:
            u = x @ a.T
            y = x @ weight.T
            y += u @ b.T
            v = grad @ b
            dx = grad @ weight
            dx += v @ a
            v.T @ x, grad.T @ u

        return run


KINDS = {"halfbyte": Halfbyte, "dense": Dense, "bitsandbytes": Bitsandbytes, "torchao": Torchao, "openblas": Openblas}


def prepare(contender: Any, task: str, rows: int, cols: int, m: int) -> Run:
    """What is timed."""
    if isinstance(contender, Openblas):
        if task != "layer":
            raise LookupError("only the layer is measured")
        return contender.step(m)
    codec = {"quantize": "quantize", "dequantize": "dequantize", "dequantize into a buffer": "dequantize_into"}
    if task in codec:
        if isinstance(contender, Dense):
            raise LookupError("dense has no codec")
        run: Run = getattr(contender, codec[task])()
        return run
    x, grad = inputs(m, cols, rows)
    if task == "layer":
        return trained(contender.layer, x, grad)
    forward: Run = contender.forward(x) if task == "forward" else contender.both(x, grad)
    return forward


def broom(kind: type) -> Run:
    """Sweeps the caches: 64 MB, twice a large last-level cache's share. With torch's threads, where the contender has
    them, or they would sleep meanwhile and wake up on one core; OpenBLAS' go on spinning."""
    if kind is Openblas:
        import numpy as np

        numbers = np.zeros(16 << 20, np.float32)
        return lambda: np.add(numbers, 1, out=numbers)
    import torch

    memory = torch.zeros(16 << 20)
    return lambda: memory.add_(1)


def main() -> None:
    """Answer until the input ends."""
    kind = KINDS[sys.argv[1]]
    answers, sys.stdout = sys.stdout, sys.stderr
    sweep = broom(kind)
    contender: Any = None
    shape, last, run = (0, 0), "", Run
    for line in sys.stdin:
        case = json.loads(line)
        try:
            if shape != (case["rows"], case["cols"]):
                weight.cache_clear()
                contender, shape = kind(case["rows"], case["cols"]), (case["rows"], case["cols"])
            if line != last:
                inputs.cache_clear()
                run, last = prepare(contender, **case), line
            run()  # after a pause the system puts a process's threads on one core for some milliseconds
            sweep()
            started = time.perf_counter()
            run()
            result: dict[str, Any] = {"seconds": time.perf_counter() - started}
        except Exception as error:  # whatever a peer raises is what there is to say about it
            text = str(error).partition(". ")[0].partition("\n")[0]
            result = {"cannot": f"{type(error).__name__}: {text}"}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
