"""Where bytes live: on the device, in host memory, on disk."""

from halfbyte.store.activations import ActivationStore
from halfbyte.store.direct_io import ALIGNMENT, AlignedBuffer, DirectFile
from halfbyte.store.layers import Extent, LayerStore
from halfbyte.store.page_pool import PagePool
from halfbyte.store.rows import RowStore
from halfbyte.store.tiers import DiskTier, HostTier, Memory, memory_of

__all__ = [
    "ALIGNMENT",
    "ActivationStore",
    "AlignedBuffer",
    "DirectFile",
    "DiskTier",
    "Extent",
    "HostTier",
    "LayerStore",
    "Memory",
    "PagePool",
    "RowStore",
    "memory_of",
]
