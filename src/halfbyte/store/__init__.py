"""Where bytes live: on the device, in host memory, on disk."""

from halfbyte.store.direct_io import ALIGNMENT, AlignedBuffer, DirectFile
from halfbyte.store.layers import Extent, LayerStore

__all__ = ["ALIGNMENT", "AlignedBuffer", "DirectFile", "Extent", "LayerStore"]
