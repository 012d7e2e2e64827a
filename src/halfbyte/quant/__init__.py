"""What a 4-bit weight means: codebooks, block geometry, packing, double quantization, the plain-torch reference."""

from halfbyte.quant.blocks import bits_per_weight, quantized_bytes, slice_rows
from halfbyte.quant.quantize import SliceQuantizer, quantize, quantize_slices
from halfbyte.quant.weight import QuantizedWeight

__all__ = [
    "QuantizedWeight", "SliceQuantizer", "bits_per_weight", "quantize", "quantize_slices", "quantized_bytes",
    "slice_rows",
]  # fmt: skip
