"""The homes of chunks on NVMe: where in the store they are, what of them memory keeps, and second slots."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from tierflow.aio import Extent
from tierflow.swap.pool import Lease
from tierflow.swap.tickets import Done, Ticket
from tierflow.swap.timeline import Lane
from tierflow.swap.types import Chunk, Kind, Tier

if TYPE_CHECKING:
    from tierflow.swap.manager import Manager


class NvmeHomes:
    """Reads and writes pieces of homes on NVMe; decides nothing.

    A home may be kept in HOST for its first bytes: whoever reads or writes the chunk need not know, and the drive sees the
    rest alone.
    """

    def __init__(self, manager: Manager):
        self._manager = manager
        self._extents: dict[int, Extent] = {}
        self._spares: dict[int, Extent] = {}
        self._kept: dict[int, Lease] = {}

    def create(self, chunk: Chunk, kept: int) -> None:
        """Gives the chunk its place, ``kept`` bytes of it (whole I/O blocks, and not all of them) in HOST."""
        store = self._manager.store
        assert store is not None and kept < chunk.nbytes
        self._extents[chunk.id] = store.allocate(chunk.nbytes - kept)
        if kept:
            self._kept[chunk.id] = self._manager.pools[Tier.HOST].resident.lease(kept)
            self._manager.ledger.keep_in(Tier.HOST, kept)

    def add_spare(self, chunk: Chunk) -> None:
        """Gives the chunk, of which HOST keeps nothing, a second slot."""
        store = self._manager.store
        assert store is not None and chunk.id not in self._kept
        self._spares[chunk.id] = store.allocate(chunk.nbytes)

    def has_spare(self, chunk: Chunk) -> bool:
        """Whether the chunk has a second slot."""
        return chunk.id in self._spares

    def flip(self, chunk: Chunk) -> None:
        """The chunk's second slot becomes its home, and the home the second slot."""
        self._extents[chunk.id], self._spares[chunk.id] = self._spares[chunk.id], self._extents[chunk.id]

    def read(self, chunk: Chunk, dst: torch.Tensor, begin: int = 0, spare: bool = False) -> Ticket:
        """Starts reading ``dst.nbytes`` bytes at byte ``begin`` of the chunk's home (or second slot) into memory."""
        manager, began = self._manager, time.perf_counter()
        done = self._copy_kept(Lane.TO_DEVICE, chunk, dst, begin)
        if done == dst.nbytes:
            return Done(began)
        assert manager.store is not None
        rest = dst[done:]
        manager.traffic.nvme_read += rest.nbytes
        ticket = manager.store.read(rest, self._offset(chunk, begin + done, spare))
        manager.timeline.follow(Lane.READ, manager.timeline.name(chunk.id), ticket.times, rest.nbytes)
        return ticket

    def write(
        self, chunk: Chunk, src: torch.Tensor, begin: int = 0, spare: bool = False, urgent: bool = False
    ) -> Ticket:
        """Starts writing ``src`` at byte ``begin`` of the chunk's home (or second slot).

        ``urgent``: the memory is wanted for something else.
        """
        manager, began = self._manager, time.perf_counter()
        done = self._copy_kept(Lane.TO_HOST, chunk, src, begin)
        if done == src.nbytes:
            return Done(began)
        assert manager.store is not None
        rest = src[done:]
        manager.traffic.nvme_written += rest.nbytes
        ticket = manager.store.write(rest, self._offset(chunk, begin + done, spare), urgent=urgent)
        manager.timeline.follow(Lane.WRITE, manager.timeline.name(chunk.id), ticket.times, rest.nbytes)
        return ticket

    def _copy_kept(self, lane: Lane, chunk: Chunk, data: torch.Tensor, begin: int) -> int:
        """Copies what HOST keeps of the home's bytes from ``begin`` on, from there (TO_DEVICE) or to it: the first of
        ``data``, if any. Returns how many bytes that were.
        """
        lease = self._kept.get(chunk.id)
        if lease is None or begin >= lease.nbytes:
            return 0
        began = time.perf_counter()
        kept = lease.bytes()[begin : begin + data.nbytes]
        part = data[: kept.nbytes]
        part.copy_(kept) if lane is Lane.TO_DEVICE else kept.copy_(part)
        self._note(lane, chunk, began, kept.nbytes)
        return kept.nbytes

    def _note(self, lane: Lane, chunk: Chunk, began: float, nbytes: int) -> None:
        manager = self._manager
        if not manager.lane.direct or chunk.kind is not Kind.PARAM:  # a copy within HOST, and none to or from DEVICE
            return
        if lane is Lane.TO_DEVICE:
            manager.traffic.to_device += nbytes
        else:
            manager.traffic.to_host += nbytes
        manager.timeline.span(lane, manager.timeline.name(chunk.id), began, nbytes=nbytes)

    def _offset(self, chunk: Chunk, begin: int, spare: bool) -> int:
        """Where in the store byte ``begin`` of the chunk is."""
        kept = self._kept.get(chunk.id)
        return (self._spares if spare else self._extents)[chunk.id].offset + begin - (kept.nbytes if kept else 0)

    def close(self) -> None:
        """Gives back what memory keeps; the store goes with its manager."""
        for lease in self._kept.values():
            lease.release()
        self._kept.clear()
