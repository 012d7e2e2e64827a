"""Where bytes live: on the device, in host memory, on disk."""

from halfbyte.store.direct_io import ALIGNMENT, AlignedBuffer, DirectFile

__all__ = ["ALIGNMENT", "AlignedBuffer", "DirectFile"]
