"""What each way of training costs and gives on the user's own model and data: runs side by side, and one page."""

from halfbyte.compare.job import Comparison, compare
from halfbyte.compare.variants import BUILT_IN, Variant

__all__ = ["BUILT_IN", "Comparison", "Variant", "compare"]
