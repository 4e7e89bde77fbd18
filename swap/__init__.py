"""What lives where: tiers, pools, the residency ledger, the lanes that move bytes, and their manager."""

from tierflow.swap.arena import Arena, CudaArena
from tierflow.swap.lanes import CudaLane, HostLane
from tierflow.swap.ledger import TRANSITIONS, Event, Ledger
from tierflow.swap.manager import Manager, TierPools, Traffic
from tierflow.swap.paged import PagedMemory, paged_bytes
from tierflow.swap.pool import DebugMemory, Lease, Pool, aliases
from tierflow.swap.tickets import Ticket
from tierflow.swap.timeline import Lane, Lanes, Span, Timeline
from tierflow.swap.types import (
    ALIGN_BYTES,
    IO_BYTES,
    CapacityError,
    Chunk,
    CopyState,
    Kind,
    LedgerError,
    Tier,
)

__all__ = [
    "ALIGN_BYTES",
    "IO_BYTES",
    "TRANSITIONS",
    "Arena",
    "CapacityError",
    "Chunk",
    "CopyState",
    "CudaArena",
    "CudaLane",
    "DebugMemory",
    "Event",
    "HostLane",
    "Kind",
    "Lane",
    "Lanes",
    "Lease",
    "Ledger",
    "LedgerError",
    "Manager",
    "PagedMemory",
    "Pool",
    "Span",
    "Ticket",
    "Tier",
    "TierPools",
    "Timeline",
    "Traffic",
    "aliases",
    "paged_bytes",
]
