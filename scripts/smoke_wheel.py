"""Run against an installed wheel: the native kernels load, and one of each gives the reference's result."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import halfbyte
from halfbyte.kernels import kernel_report
from halfbyte.quant.reference import dequantize_reference, quantize_reference


def main() -> None:
    home = Path(halfbyte.__file__).resolve().parent
    checkout = Path(__file__).resolve().parent.parent
    if home.is_relative_to(checkout / "src"):
        sys.exit(f"smoke: {home} is the checkout, not an installed wheel")
    for row in kernel_report():
        print(f"{row.op:<18}{row.device:<6}{row.kernel:<38}{row.reason}")
        if row.kernel == "torch reference":
            sys.exit(f"smoke: no native kernel for {row.op}: {row.reason}")

    torch.manual_seed(0)
    weight, x = torch.randn(192, 256), torch.randn(5, 256)
    quantized = halfbyte.quantize(weight, double_quant=False, scale="absmax")
    codes, absmax = quantize_reference(weight, "nf4", 64)
    if not (torch.equal(quantized.codes, codes) and torch.equal(quantized.absmax, absmax)):
        sys.exit("smoke: quantize differs from the reference")
    nested = halfbyte.quantize(weight)
    decoded = nested.dequantize()
    if not torch.equal(decoded, dequantize_reference(*nested.op_args, nested.shape, torch.float32)):
        sys.exit("smoke: dequantize differs from the reference")
    layer = halfbyte.Linear4bit.from_quantized(nested)
    x.requires_grad_(True)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, x @ decoded.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ decoded, rtol=1e-5, atol=1e-4)
    print(f"smoke: halfbyte from {home} works with torch {torch.__version__}")


if __name__ == "__main__":
    main()
