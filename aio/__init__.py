"""Asynchronous file I/O: a range of bytes in unnamed, preallocated files, and transfers between it and memory.

    with tierflow.aio.open(["/mnt/nvme0", "/mnt/nvme1"], capacity=8 << 30) as store:
        extent = store.allocate(buffer.nbytes)
        store.write(buffer, extent.offset).wait()
        store.read(buffer, extent.offset).wait()

Nothing here knows tensors, training or torch. All sizes and offsets are in bytes. See docs/aio.md.
"""

from .errors import AioError, CorruptData, DiskFull, EngineUnavailable, OutOfSpace, StoreClosed
from .extents import Extent, ExtentAllocator
from .measure import Speed, measure
from .opening import DEFAULT_BLOCK_SIZE, DEFAULT_QUEUE_DEPTH, DEFAULT_THREADS, open
from .probe import Probe, probe
from .store import Path, Store
from .ticket import Ticket

__all__ = [
    "DEFAULT_BLOCK_SIZE",
    "DEFAULT_QUEUE_DEPTH",
    "DEFAULT_THREADS",
    "AioError",
    "CorruptData",
    "DiskFull",
    "EngineUnavailable",
    "Extent",
    "ExtentAllocator",
    "OutOfSpace",
    "Path",
    "Probe",
    "Speed",
    "Store",
    "StoreClosed",
    "Ticket",
    "measure",
    "open",
    "probe",
]
