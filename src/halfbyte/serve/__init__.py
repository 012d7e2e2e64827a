"""An engine that serves many adapters over one base, and an OpenAI-compatible server (serve.start, extra `serve`)."""

from halfbyte.serve.adapters import Adapters, Room
from halfbyte.serve.engine import Engine

__all__ = ["Adapters", "Engine", "Room"]
