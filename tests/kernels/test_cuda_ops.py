"""Which kernels serve CUDA tensors and why; what is handed to bitsandbytes. No GPU: the functions get CPU tensors.

bitsandbytes registers its CPU kernels under the same operators, so that their arguments can be proven here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.kernels import bnb_cuda, cuda_ops, kernel_report, registry
from halfbyte.kernels.registry import CUDA_VARIABLE, OPS, CudaChoice, cuda_choice
from halfbyte.quant.absmax import compress_absmax
from halfbyte.quant.reference import dequantize_reference, quantize_reference


@pytest.fixture(autouse=True)
def _fresh_choice() -> Iterator[None]:
    cuda_choice.cache_clear()
    yield
    cuda_choice.cache_clear()


def missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As on a machine without the packages `names`, and with bitsandbytes' CUDA library if it is not one of them."""
    find = registry.importlib.util.find_spec
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None if name in names else find("torch"))
    monkeypatch.setattr(bnb_cuda, "find", lambda: None)


@pytest.mark.parametrize(
    ("absent", "kernels"),
    [
        ((), ("triton", "bitsandbytes")), (("bitsandbytes",), ("triton",)), (("triton",), ("bitsandbytes",)),
        (("triton", "bitsandbytes"), ()),
    ],
)  # fmt: skip
def test_what_is_installed_serves(
    absent: tuple[str, ...], kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(monkeypatch, *absent)
    assert cuda_choice().kernels == kernels
    assert all(f"no {name}" in cuda_choice().reason for name in absent)


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "triton")
    for wanted, kernels in (("reference", ()), ("bitsandbytes", ("bitsandbytes",))):
        monkeypatch.setenv(CUDA_VARIABLE, wanted)
        cuda_choice.cache_clear()
        assert cuda_choice() == CudaChoice(kernels, f"{CUDA_VARIABLE}={wanted}")
    for wanted, message in (("triton", "triton cannot serve"), ("cuda", "Choose one of triton, bitsandbytes, ref")):
        monkeypatch.setenv(CUDA_VARIABLE, wanted)
        cuda_choice.cache_clear()
        with pytest.raises(ConfigError, match=message):
            cuda_choice()


def test_report_has_a_row_for_each_operator_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    missing(monkeypatch)
    kernels = {row.op: row.kernel for row in kernel_report() if row.device == "cuda"}
    assert list(kernels)[: len(OPS)] == list(OPS)
    assert kernels["lora_linear_4bit"] == "triton decode + torch matmul"
    assert kernels["packed_attention"] == "torch FlashAttention"
    assert kernels["quantize_4bit"] == "triton"
    assert kernels["linear_4bit"] == "triton, bitsandbytes for one or two rows"


def test_bitsandbytes_without_its_cuda_library_says_so() -> None:
    pytest.importorskip("bitsandbytes")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "no library for this CUDA" in str(bnb_cuda.find())


@pytest.mark.parametrize("names", [("bitsandbytes",), ()], ids=["bitsandbytes", "reference"])
@pytest.mark.parametrize(("rows", "cols"), [(70, 192), (12, 100)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_operators(
    names: tuple[str, ...], rows: int, cols: int, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if names:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(cuda_ops, "cuda_choice", lambda: CudaChoice(names, "test"))
    torch.manual_seed(0)
    weight = torch.randn(rows, cols)
    codes, absmax = cuda_ops.quantize_4bit(weight, "nf4", 64)
    assert torch.equal(codes, quantize_reference(weight, "nf4", 64)[0])
    scales = compress_absmax(absmax) if double_quant else (absmax, None, 0.0)
    packed = (codes, *scales, "nf4", 64)
    decoded = dequantize_reference(*packed, (rows, cols), torch.float32)
    assert torch.equal(cuda_ops.dequantize_4bit(*packed, [rows, cols], torch.float32), decoded)
    x, grad, bias = torch.randn(2, 3, cols), torch.randn(2, 3, rows), torch.randn(rows)
    torch.testing.assert_close(cuda_ops.linear_4bit(x, *packed, rows, bias), x @ decoded.T + bias)
    torch.testing.assert_close(cuda_ops.linear_4bit_dx(grad, *packed, cols), grad @ decoded)
    assert cuda_ops.linear_4bit(x[:0], *packed, rows, bias).shape == (0, 3, rows)
    assert cuda_ops.dequantize_4bit(*packed, [rows, cols], torch.float64).dtype == torch.float64


def test_a_row_or_two_go_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("triton")
    from halfbyte.kernels.triton import kernels as ours

    monkeypatch.setattr(cuda_ops, "cuda_choice", lambda: CudaChoice(("triton", "bitsandbytes"), "test"))
    served: list[str] = []
    for name, module in (("triton", ours), ("bitsandbytes", bnb_cuda)):
        monkeypatch.setattr(
            module, "linear", lambda x, *_, name=name: (served.append(name), x.new_zeros(len(x), 8))[1]
        )
    packed = (*quantize_reference(torch.randn(8, 64), "nf4", 64), None, 0.0, "nf4", 64)
    for rows in (1, 2, 3, 65):
        cuda_ops.linear_4bit(torch.randn(rows, 64), *packed, 8, None)
    assert served == ["bitsandbytes", "bitsandbytes", "triton", "triton"]


def test_a_wrong_weight_never_reaches_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ops, "cuda_choice", lambda: CudaChoice(("triton", "bitsandbytes"), "test"))
    codes, absmax = quantize_reference(torch.randn(8, 64), "nf4", 64)
    x = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="code bytes"):
        cuda_ops.linear_4bit(x, codes[1:], absmax, None, 0.0, "nf4", 64, 8, None)
    with pytest.raises(RuntimeError, match="scales"):
        cuda_ops.linear_4bit_dx(torch.randn(2, 8), codes, absmax[1:], None, 0.0, "nf4", 64, 64)
    with pytest.raises(ValueError, match="absmax on meta"):
        cuda_ops.dequantize_4bit(codes, absmax.to("meta"), None, 0.0, "nf4", 64, [8, 64], torch.float32)
    with pytest.raises(ValueError, match="bias"):
        cuda_ops.linear_4bit(x, codes, absmax, None, 0.0, "nf4", 64, 8, torch.randn(7))


def test_adamw_without_triton_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ops, "cuda_choice", lambda: CudaChoice(("bitsandbytes",), "test"))
    pages = [[torch.ones(4)], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)]]
    cuda_ops.adamw_32bit_(*pages, 0.1, 0.9, 0.999, 1e-8, 0.0, 1)
    torch.testing.assert_close(pages[0][0], torch.full((4,), 0.9))
