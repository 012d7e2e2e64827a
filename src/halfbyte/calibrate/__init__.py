"""Which codes and scales lose least on the user's data: chosen layer by layer, written in the same format."""

from halfbyte.calibrate.decompose import StartResult, quantize_with_start
from halfbyte.calibrate.run import CalibrateResult, calibrate_model

__all__ = ["CalibrateResult", "StartResult", "calibrate_model", "quantize_with_start"]
