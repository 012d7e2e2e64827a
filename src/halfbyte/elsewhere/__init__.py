"""Configs of other tools, as ours."""

from halfbyte.elsewhere.translate import SOURCES, Translation, translate

__all__ = ["SOURCES", "Translation", "translate"]
