"""The operators of `quant`, faster, and those of decoder layer and head. Importing this room registers them."""

from halfbyte.kernels import (  # noqa: F401  (they register)
    adamw,
    attention,
    cpu_ops,
    cross_entropy,
    cuda_attention,
    cuda_layer,
    cuda_lora,
    cuda_ops,
    frozen_linear,
    gated,
    lora_linear,
    norm,
    norm_heads,
    rope,
)
from halfbyte.kernels.crossover import keep_to, panel_rule
from halfbyte.kernels.registry import KernelRow, count_nonfinite, kernel_report, release_workspace

__all__ = ["KernelRow", "count_nonfinite", "keep_to", "kernel_report", "panel_rule", "release_workspace"]
