"""The operators of `quant`, faster, and those of decoder layer and head. Importing this room registers them."""

from halfbyte.kernels import attention, cpu_ops, cross_entropy, frozen_linear, gated, norm, rope  # noqa: F401  (register)
from halfbyte.kernels.registry import KernelRow, count_nonfinite, kernel_report, release_workspace

__all__ = ["KernelRow", "count_nonfinite", "kernel_report", "release_workspace"]
