"""Layers."""

from halfbyte.nn.linear4bit import Linear4bit

__all__ = ["Linear4bit"]
