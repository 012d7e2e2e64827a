"""What `halfbyte merge` holds at its fullest moment, beside Python and the libraries."""

from __future__ import annotations

from halfbyte.plan.architecture import Architecture

GROUP_TOKENS = 512
"""Tokens that drift is measured on at a time: decoding the weights is the smaller part, and logits stay small."""
CALIBRATION_TOKENS = 8192
"""Of training text that a 4-bit merge looks at."""
CHUNK_TOKENS = 512
"""Of calibration text that goes through a decoder layer at a time, in each of two models."""
MEASURED_LENGTH = 128
"""Tokens of a sample that the sensitivity of layers is measured on."""
LOGITS, LAYER, TEXT, MATRICES = 5, 6, 11, 7
"""Alive at once: tensors of a group's logits, of a layer's widths, of these with calibration text; and matrices of the
widest one's size while its codes are chosen. Measured on SmolLM2-135M: 16bit 1.248 GB of 1.251 predicted, gguf F16
1.76 of 1.85; text for 4bit, which is less than drift, 0.171 GB of 0.214."""
SQUARES, SQUARES_OF_FEW = 7, 5
"""Of a matrix's columns, meanwhile; the second where it has at most half as many rows (`quant.moments.shift`)."""


def drift_bytes(vocab: int, width: int, widest: int, tokens: int) -> int:
    """Base + adapter and the merged model compared, tensor by tensor.

    Args:
        width, widest: of the model's states, and the largest side of a matrix.
        tokens: computed together.
    """
    return 4 * tokens * (LOGITS * vocab + LAYER * widest) + 4 * max(vocab * width, widest * width)


def error_feedback_bytes(width: int, widest: int, rows: int, *, start: bool = False) -> int:
    """Codes of 4 bits chosen on `rows` tokens of text, which go through two models side by side: the hidden states of
    all of it, and the larger of a chunk in a layer with the moments it is added to, and of a matrix being written;
    with a `start`, for which the moments' root is there, too, and once more while it is divided by.
    """
    layer = 3 * widest * width + 4 * width**2  # its weights are read once for all chunks
    chunk = 2 * CHUNK_TOKENS * (TEXT * (widest + width) + widest) + 2 * widest**2 + layer
    writing = (SQUARES_OF_FEW if 2 * width <= widest and not start else SQUARES) * widest**2
    return 4 * (2 * rows * width + max(chunk, writing) + MATRICES * widest * width)


def waiting_bytes(width: int, widest: int, tokens: int) -> int:
    """Text that waits inside a decoder layer, in both models: a residual, a normalized state, the widest input."""
    return 4 * 2 * tokens * (2 * width + widest)


def sensitivity_bytes(vocab: int, width: int, widest: int, units: int, tokens: int) -> int:
    """Each of `units` quantized alone: the hidden states of `tokens` tokens once for each, and the larger of a pass
    through a layer with two matrices decoded, and of embeddings, head and the logits of MEASURED_LENGTH tokens.
    """
    layer = tokens * (LAYER + TEXT) * (widest + width) + MATRICES * widest * width
    head = 2 * vocab * width + LOGITS * MEASURED_LENGTH * vocab
    return 4 * ((units + 2) * tokens * width + max(layer, head))


def merge_memory(arch: Architecture, runtime: int) -> dict[str, int]:
    """By format, on samples of up to `GROUP_TOKENS` tokens."""
    drift = drift_bytes(arch.vocab, arch.hidden, arch.widest, GROUP_TOKENS)
    text = error_feedback_bytes(arch.hidden, arch.widest, CALIBRATION_TOKENS)
    return {"16bit": runtime + drift, "4bit": runtime + max(drift, text)}
