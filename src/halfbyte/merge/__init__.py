"""A base and its adapter as one model, and how far that is from what was trained."""

import sys
from types import ModuleType
from typing import Any

from halfbyte.merge.drift import Drift
from halfbyte.merge.run import MergeResult, merge

__all__ = ["Drift", "MergeResult", "merge"]


class _Room(ModuleType):
    """A room that is also the function of its name, as `halfbyte.train` is."""

    def __call__(self, *args: Any, **kwargs: Any) -> MergeResult:
        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
