"""The loop."""

from halfbyte.train.loop import TrainResult, train
from halfbyte.train.observer import Observer, StepMetrics

__all__ = ["Observer", "StepMetrics", "TrainResult", "train"]
