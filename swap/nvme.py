"""The homes of chunks on NVMe: where in the store they are, what of them memory keeps, and second slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from tierflow.aio import Extent
from tierflow.swap.pool import Lease
from tierflow.swap.tickets import Both, Done, Ticket, finish
from tierflow.swap.timeline import Lane
from tierflow.swap.types import Chunk, Tier

if TYPE_CHECKING:
    from tierflow.swap.manager import Manager


class NvmeHomes:
    """Reads and writes pieces of homes on NVMe; decides nothing.

    A home's first bytes may be kept in memory, on DEVICE and then in HOST: whoever reads or writes the chunk need not know,
    and the drive sees the rest alone. If they are all of it, the chunk is here for its parts and not on NVMe.
    """

    def __init__(self, manager: Manager):
        self._manager = manager
        self._extents: dict[int, Extent] = {}
        self._spares: dict[int, Extent] = {}
        self._kept: dict[int, list[tuple[Tier, Lease]]] = {}

    def create(self, chunk: Chunk, kept: Sequence[tuple[Tier, int]]) -> None:
        """Gives the chunk its place; ``kept``: how many of its bytes are in which memory, in order, in whole I/O blocks."""
        manager = self._manager
        for tier, nbytes in kept:
            lease = manager.pools[tier].resident.lease(nbytes)
            self._kept.setdefault(chunk.id, []).append((tier, lease))
            manager.ledger.keep_in(tier, nbytes)
        rest = chunk.nbytes - self._kept_bytes(chunk)
        if rest:
            assert manager.store is not None
            self._extents[chunk.id] = manager.store.allocate(rest)

    def add_spare(self, chunk: Chunk) -> None:
        """Gives the chunk, of which memory keeps nothing, a second slot."""
        store = self._manager.store
        assert store is not None and chunk.id not in self._kept
        self._spares[chunk.id] = store.allocate(chunk.nbytes)

    def has_spare(self, chunk: Chunk) -> bool:
        """Whether the chunk has a second slot."""
        return chunk.id in self._spares

    def flip(self, chunk: Chunk) -> None:
        """The chunk's second slot becomes its home, and the home the second slot."""
        self._extents[chunk.id], self._spares[chunk.id] = self._spares[chunk.id], self._extents[chunk.id]

    # ---- what memory keeps

    def in_memory(self, chunk: Chunk) -> bool:
        """Whether memory keeps all of the chunk, in several places."""
        return chunk.id in self._kept and chunk.id not in self._extents

    def tiers(self, chunk: Chunk) -> list[Tier]:
        """Every tier that has some of the chunk for good."""
        memory = [tier for tier, _ in self._kept.get(chunk.id, ())]
        return [*memory, Tier.NVME] if chunk.id in self._extents else memory

    def kept(self, chunk: Chunk, begin: int, end: int) -> Iterator[tuple[Tier, torch.Tensor]]:
        """What memory keeps of bytes [begin, end) of the chunk, in order."""
        first = 0
        for tier, lease in self._kept.get(chunk.id, ()):
            low, high = max(begin, first), min(end, first + lease.nbytes)
            if low < high:
                yield tier, lease.bytes()[low - first : high - first]
            first += lease.nbytes

    def _kept_bytes(self, chunk: Chunk) -> int:
        return sum(lease.nbytes for _, lease in self._kept.get(chunk.id, ()))

    # ---- transfers

    def read(
        self, chunk: Chunk, dst: torch.Tensor, begin: int = 0, spare: bool = False, tier: Tier = Tier.HOST
    ) -> Ticket:
        """Starts reading ``dst.nbytes`` bytes at byte ``begin`` of the chunk's home (or second slot) into memory of ``tier``."""
        manager, done = self._manager, 0
        copied: Ticket = Done(time.perf_counter())
        for source, there in self.kept(chunk, begin, begin + dst.nbytes):
            copied = self._copy(copied, chunk, source, there, tier, dst[done : done + there.nbytes], settled=True)
            done += there.nbytes
        if done == dst.nbytes:
            return copied
        assert manager.store is not None
        rest, at = dst[done:], self._offset(chunk, begin + done, spare)
        return self._with_rest(copied, partial(manager.store.read, rest, at), Lane.READ, chunk, rest.nbytes)

    def write(
        self, chunk: Chunk, src: torch.Tensor, begin: int = 0, spare: bool = False, urgent: bool = False,
        tier: Tier = Tier.HOST,
    ) -> Ticket:  # fmt: skip
        """Starts writing ``src``, which is in memory of ``tier``, at byte ``begin`` of the chunk's home (or second slot).

        ``urgent``: the memory is wanted for something else.
        """
        manager, done = self._manager, 0
        copied: Ticket = Done(time.perf_counter())
        for target, there in self.kept(chunk, begin, begin + src.nbytes):
            copied = self._copy(copied, chunk, tier, src[done : done + there.nbytes], target, there)
            done += there.nbytes
        if done == src.nbytes:
            return copied
        assert manager.store is not None
        rest, at = src[done:], self._offset(chunk, begin + done, spare)
        return self._with_rest(copied, partial(manager.store.write, rest, at, urgent=urgent), Lane.WRITE, chunk, rest.nbytes)

    def _with_rest(self, copied: Ticket, start: Callable[[], Ticket], lane: Lane, chunk: Chunk, nbytes: int) -> Ticket:
        """Starts the drive's transfer behind the copies; if it takes none, these are not left under way either."""
        try:
            ticket = start()
        except BaseException:
            finish(copied)
            raise
        self._manager.moves(lane, chunk, ticket, nbytes)
        return ticket if copied.done() else Both(copied, ticket)

    def _copy(
        self, before: Ticket, chunk: Chunk, source: Tier, src: torch.Tensor, target: Tier, dst: torch.Tensor,
        settled: bool = False,
    ) -> Ticket:  # fmt: skip
        """Starts a copy from memory to memory. Returns the ticket of what ends last, of it and the piece's copies ``before``:
        at most one of them crosses to HOST, and those to DEVICE end in their order. ``settled``: see ``CudaLane.drain``.
        """
        lane = self._manager.lane
        if source is target is Tier.HOST:
            dst.copy_(src)
            return before
        ticket = lane.fill(dst, src) if target is Tier.DEVICE else lane.drain(dst, src, settled=settled)
        if source is target:  # it crosses no link, and takes the time of one that does where DEVICE is the processor's
            self._manager.timeline.follow(Lane.TO_DEVICE, self._manager.timeline.name(chunk.id), ticket.times, dst.nbytes)
        else:
            self._manager.moves(Lane.TO_DEVICE if target is Tier.DEVICE else Lane.TO_HOST, chunk, ticket, dst.nbytes)
        return ticket

    def _offset(self, chunk: Chunk, begin: int, spare: bool) -> int:
        """Where in the store byte ``begin`` of the chunk is."""
        return (self._spares if spare else self._extents)[chunk.id].offset + begin - self._kept_bytes(chunk)

    def close(self) -> None:
        """Gives back what memory keeps; the store goes with its manager."""
        for _, lease in (place for places in self._kept.values() for place in places):
            lease.release()
        self._kept.clear()
