"""Layers."""

from halfbyte.nn.cross_entropy import IGNORE_INDEX, chunked_cross_entropy
from halfbyte.nn.divergence import chunked_divergence
from halfbyte.nn.frozen_linear import FrozenLinear
from halfbyte.nn.linear4bit import Linear4bit

__all__ = ["IGNORE_INDEX", "FrozenLinear", "Linear4bit", "chunked_cross_entropy", "chunked_divergence"]
