"""The loop."""

import sys
from types import ModuleType
from typing import Any

from halfbyte.train.loop import train
from halfbyte.train.observer import Observer, Observers, StepMetrics
from halfbyte.train.result import TrainResult

__all__ = ["Observer", "Observers", "StepMetrics", "TrainResult", "train"]


class _Room(ModuleType):
    """A room that is also the function of its name: importing it binds ``halfbyte.train`` over the public function."""

    def __call__(self, *args: Any, **kwargs: Any) -> TrainResult:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
