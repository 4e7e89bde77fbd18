"""Asynchronous file I/O: one unnamed, preallocated file in a directory, and transfers between it and memory.

    store = tierflow.aio.open("/mnt/nvme0", capacity=8 << 30)
    extent = store.allocate(len(buffer))
    store.write(buffer, extent.offset).wait()
    store.read(buffer, extent.offset).wait()
    store.close()

Nothing here knows tensors, training or torch. All sizes and offsets are in bytes.
"""

from .errors import AioError, DiskFull, EngineUnavailable, OutOfSpace, StoreClosed
from .extents import Extent, ExtentAllocator
from .probe import Probe, probe
from .store import DEFAULT_BLOCK_SIZE, DEFAULT_QUEUE_DEPTH, DEFAULT_THREADS, Store, open
from .ticket import Ticket

__all__ = [
    "DEFAULT_BLOCK_SIZE",
    "DEFAULT_QUEUE_DEPTH",
    "DEFAULT_THREADS",
    "AioError",
    "DiskFull",
    "EngineUnavailable",
    "Extent",
    "ExtentAllocator",
    "OutOfSpace",
    "Probe",
    "Store",
    "StoreClosed",
    "Ticket",
    "open",
    "probe",
]
