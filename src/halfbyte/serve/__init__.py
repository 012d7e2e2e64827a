"""An OpenAI-compatible server: many adapters over one resident 4-bit base, batched together."""

from halfbyte.serve.adapters import Adapters
from halfbyte.serve.engine import Engine
from halfbyte.serve.start import Settings, serve

__all__ = ["Adapters", "Engine", "Settings", "serve"]
