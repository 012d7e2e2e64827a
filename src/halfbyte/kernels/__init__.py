"""The operators of `quant`, faster. Importing this room registers the CPU kernels under them."""

from halfbyte.kernels import cpu_ops  # noqa: F401  (registers)
from halfbyte.kernels.registry import KernelRow, count_nonfinite, kernel_report, release_workspace

__all__ = ["KernelRow", "count_nonfinite", "kernel_report", "release_workspace"]
