"""The Triton kernels without a GPU: their results in Triton's interpreter, and the code its compiler makes of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WEIGHT = {
    "codes": "*u8", "absmax": "*u8", "nested_absmax": "*fp32", "codebook": "*fp32", "dynamic_map": "*fp32",
    "nested_offset": "fp32",
}  # fmt: skip
CAPABILITIES = [80, 90, 120]
"""Ampere, Hopper, consumer Blackwell."""
SHARED_BYTES = 64 << 10
"""Which every GPU since Turing has."""


def test_results_in_the_interpreter() -> None:
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    quiet = ["-W", "ignore::pytest.PytestConfigWarning"]  # under python -O
    command = [sys.executable, "-m", "pytest", *quiet, "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_imports_triton_before_it_is_asked_for() -> None:
    code = "import sys, torch, halfbyte.kernels; sys.exit('triton' in sys.modules or 'bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


class Compiled:
    """A kernel compiled for an NVIDIA GPU that need not be there, as its launcher would have it compiled.

    Pointers, sizes and counts are multiples of 16, as they are in a model.
    """

    def __init__(self, kernel: Any, capability: int, types: dict[str, str], **constants: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        num_warps = constants.pop("num_warps", 4)
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        aligned = [name[0] == "*" or name == "i32" for name in signature.values()]
        self.result = compile(
            ASTSource(
                fn=kernel, signature=signature, constexprs=constants,
                attrs={(i,): [["tt.divisibility", 16]] for i, is_aligned in enumerate(aligned) if is_aligned},
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False},
        )  # fmt: skip

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.result.asm["ptx"]))

    def stack_bytes(self, folder: Path) -> int:
        """Registers that did not fit, as the assembler counts them."""
        import triton

        (cubin := folder / "kernel.cubin").write_bytes(self.result.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        done = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
        return max(int(size) for size in re.findall(r"STACK:(\d+)", done.stdout))


@cache
def device_code(kernel: str, capability: int, dtype: torch.dtype, rows: int = 64, number: int = 0) -> Compiled:
    """For a 4096 x 4096 weight in blocks of 64, double-quantized; of products the tile `number` of those tried."""
    from halfbyte.kernels.triton import codec, linear, tiles

    floating = f"*{TYPES[dtype]}"
    numbers: dict[str, Any] = {"BLOCKSIZE": 64, "NESTED": True, "OFFSETS": kernel.endswith("offsets")}
    if kernel.startswith("dequantize"):
        return Compiled(
            codec.dequantize_kernel, capability, {**WEIGHT, "out": floating}, **numbers, RUNS=codec.RUNS_PER_PROGRAM
        )
    if kernel == "quantize":
        types = {"weight": floating, "boundaries": "*fp32", "order": "*u8", "codes": "*u8", "absmax": "*fp32"}
        return Compiled(codec.quantize_kernel, capability, types, BLOCKSIZE=64, BLOCKS=64, num_warps=8)
    types = {**WEIGHT, "x": floating, "grad": floating, "bias": floating, "out": floating}
    if kernel == "vector":
        depth = {"BLOCK_R": linear.VECTOR_ROWS, "BLOCK_C": linear.VECTOR_DEPTH}
        return Compiled(linear.vector_kernel, capability, types, **numbers, **depth, BIAS=True)
    choose, code, more = {
        "forward": (tiles.forward_tiling, linear.forward_kernel, {"BIAS": True}),
        "backward": (tiles.backward_tiling, linear.backward_kernel, {}),
    }[kernel]
    tiling = choose(rows, 4096, 4096, dtype)
    tile = tiling.tiles[number]
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tiling.depth, "MOST_ROWS": tiling.most_rows}
    return Compiled(code, capability, types, **numbers, **blocks, **more, num_warps=tile.num_warps)


def tiles_tried(kernel: str, dtype: torch.dtype, rows: int) -> int:
    from halfbyte.kernels.triton import tiles

    choose = tiles.forward_tiling if kernel == "forward" else tiles.backward_tiling
    return len(choose(rows, 4096, 4096, dtype).tiles)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


needs_compiler = pytest.mark.skipif(sys.platform != "linux", reason="no package triton for this system")


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_decoding_rounds_as_the_reference_does(capability: int) -> None:
    """A scale is a multiply, then an add; a value one multiply, then one rounding. Nothing is fused."""
    pytest.importorskip("triton")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert device_code("dequantize with offsets", capability, dtype).count(r"fma\.") == 0
        code = device_code("dequantize", capability, dtype)
        assert code.count(r"fma\.") == 0
        # A thread has eight weights, multiplied in pairs on the newest GPUs, and the scale that they share.
        assert code.count(r"mul\.rn\.f32") in (9, 5)
        assert code.count(r"add\.rn\.f32") == 1
        if dtype != torch.float32:
            assert code.count(r"cvt\.rn\.") in (4, 8)
    for kernel in ("forward", "backward"):
        assert device_code(kernel, capability, torch.bfloat16).count(r"fma\.") == 0
    quantize = device_code("quantize", capability, torch.float32)
    assert quantize.count(r"div\.full|div\.approx|rcp\.approx|fma\.") == 0
    assert quantize.count(r"div\.rn\.(ftz\.)?f32") > 0


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
def test_tiles_reach_the_tensor_cores_and_fit_in_registers(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for kernel in ("forward", "backward"):
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
            sizes = (16, 64) if dtype == torch.bfloat16 else (16,)
            for rows, number in ((m, i) for m in sizes for i in range(tiles_tried(kernel, dtype, m))):
                code = device_code(kernel, capability, dtype, rows, number)
                assert code.count(rf"mma.*\.f32\.{name}\.{name}") > 0, (kernel, rows)
                # What it looks up must not travel to shared memory 4 bytes at a time (`tiles.NUM_STAGES`).
                assert code.count("cp.async") == 0
                assert code.stack_bytes(tmp_path) == 0, (kernel, rows, number)
                assert code.result.metadata.shared <= SHARED_BYTES, (kernel, rows, number)
        for number in range(tiles_tried(kernel, torch.float32, 16)):
            assert device_code(kernel, capability, torch.float32, 16, number).stack_bytes(tmp_path) == 0
    for kernel in ("dequantize", "quantize", "vector"):
        assert device_code(kernel, capability, torch.bfloat16).stack_bytes(tmp_path) == 0


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_adamw_rounds_every_operation(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    import triton.language as tl

    from halfbyte.kernels.triton import adamw

    for kernel, constants in ((adamw.adamw_32bit_kernel, {"BLOCK": 1024}), (adamw.adamw_8bit_kernel, {})):
        types = dict.fromkeys(("values", "boundaries", "values_sq", "boundaries_sq"), "*fp32") | {"table": "*i64"}
        numbers = ["beta1", "rest1", "beta2", "rest2", "keep", "step_size", "root_scale", "eps"]
        code = Compiled(kernel, capability, types | dict.fromkeys(numbers, "fp32"), GRAD=tl.float32, **constants)
        assert code.count(r"fma\.|approx|div\.full") == 0
        assert code.count(r"sqrt\.rn\.(ftz\.)?f32") > 0
        assert code.stack_bytes(tmp_path) == 0


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_layers_kernels_fit_in_registers(capability: int, tmp_path: Path) -> None:
    """In bfloat16, at the sizes of an 8B model."""
    pytest.importorskip("triton")
    from halfbyte.kernels.triton import codec, group, layer, loss

    rows = dict.fromkeys(("x", "delta", "total", "out", "grad", "add", "dx", "gate_up", "d_gate_up", "again", "qkv",
                          "cos", "sin", "logits", "weight"), "*bf16")  # fmt: skip
    types = rows | {"rstd": "*fp32", "losses": "*fp32", "targets": "*i64", "eps": "fp32", "offset": "fp32"}
    types |= {"codebook": "*fp32", "dynamic_map": "*fp32", "a": "*bf16", "b": "*bf16"}
    for n in "012":
        types |= {f"codes{n}": "*u8", f"absmax{n}": "*u8", f"nested{n}": "*fp32", f"offset{n}": "fp32"}
        types |= {f"a{n}": "*fp32", f"b{n}": "*fp32", f"scaling{n}": "fp32"}
    for kernel, constants in (
        (layer.norm_kernel, {"ADD": True, "BLOCK": 4096, "num_warps": 8}),
        (layer.norm_backward_kernel, {"ADD": True, "BLOCK": 4096, "num_warps": 8}),
        (layer.gated_kernel, {"ACTIVATION": "gelu_tanh", "BLOCK": 1024}),
        (layer.gated_backward_kernel, {"ACTIVATION": "silu", "BLOCK": 1024}),
        (layer.rope_kernel, {"INVERSE": True, "HEADS": 64, "HALF": 64}),
        (loss.softmax_cross_entropy_kernel, {"BLOCK": loss.COLUMNS, "num_warps": 8}),
        (group.weights_kernel, {"BLOCKSIZE": 64, "NESTED": True, "OFFSETS": True, "RUNS": codec.RUNS_PER_PROGRAM}),
        (group.adapters_kernel, {"BLOCK": group.ELEMENTS}),
    ):
        assert Compiled(kernel, capability, types, **constants).stack_bytes(tmp_path) == 0


@needs_compiler
def test_memory_is_read_and_written_in_vectors() -> None:
    pytest.importorskip("triton")
    code = device_code("dequantize", 80, torch.bfloat16)
    assert code.count(r"st\.global\.v4\.b32") == 1
    assert code.count(r"ld\.global\.b8") == 1  # the scale's code; the weights' come four at a time
    assert device_code("vector", 80, torch.bfloat16).count(r"ld\.global\.v4\.b32") >= 2
