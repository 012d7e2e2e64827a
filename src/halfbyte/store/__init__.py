"""Where bytes live: on the device, in host memory, on disk."""

from halfbyte.store.activations import ActivationStore
from halfbyte.store.direct_io import ALIGNMENT, AlignedBuffer, DirectFile
from halfbyte.store.layers import Extent, LayerStore, spread
from halfbyte.store.memory import Memory, memory_of
from halfbyte.store.page_pool import PagePool
from halfbyte.store.rows import RowStore
from halfbyte.store.tiers import DiskTier, HostTier, tiers_behind

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
    "spread",
    "tiers_behind",
]
