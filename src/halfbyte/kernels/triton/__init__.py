"""The 4-bit operators in Triton, for GPUs. Nothing here is imported before a CUDA tensor, or a test, asks for it.

Not yet run on a GPU: docs/gpu.md says what is proven, how, and what is not.
"""
