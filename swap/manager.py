"""Gives chunks their memory in the tiers, and keeps the ledger true while copies come and go.

The manager acts; it does not choose. What to give up when a tier is full comes from the caller as an
ordered list of victims, and what to bring up comes as calls of ``fetches.start``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from tierflow.aio import Store
from tierflow.swap.fetches import Fetches
from tierflow.swap.lanes import DeviceLane
from tierflow.swap.ledger import Event, Ledger
from tierflow.swap.nvme import NvmeHomes
from tierflow.swap.pool import Lease, Pool
from tierflow.swap.room import Place, cheapest
from tierflow.swap.tickets import Ticket
from tierflow.swap.timeline import Lane, Timeline
from tierflow.swap.types import IO_BYTES, CapacityError, Chunk, CopyState, Tier

Victims = Callable[[Tier], Iterable[Chunk]]


@dataclass
class TierPools:
    """A memory tier's two pools: copies that stay for good, and copies that come and go."""

    resident: Pool
    working: Pool


@dataclass
class Traffic:
    """What moved since the counters were last read (bytes), and how long callers waited for it (seconds)."""

    nvme_read: int = 0
    nvme_written: int = 0
    to_device: int = 0
    to_host: int = 0
    wait_read: float = 0.0
    wait_device: float = 0.0
    wait_write: float = 0.0

    def add(self, lane: Lane, nbytes: int) -> None:
        """Counts bytes that move on a link."""
        name = _COUNTERS[lane]
        setattr(self, name, getattr(self, name) + nbytes)


_COUNTERS = {
    Lane.READ: "nvme_read", Lane.WRITE: "nvme_written", Lane.TO_DEVICE: "to_device", Lane.TO_HOST: "to_host",
}  # fmt: skip


@dataclass
class Manager:
    """Every copy's memory and the counters; ``fetches`` has what is on its way up, ``nvme`` what lives there."""

    ledger: Ledger
    pools: dict[Tier, TierPools]
    store: Store | None
    lane: DeviceLane
    on_evict: Callable[[Chunk], None] = lambda chunk: None
    on_move: Callable[[Chunk, Lease], None] = lambda chunk, lease: None
    busy_aliases: Callable[[Chunk, Lease], bool] = lambda chunk, lease: False
    traffic: Traffic = field(default_factory=Traffic)
    observer: Callable[[], None] = lambda: None  # called after memory changed hands
    on_lost: Callable[[Chunk], None] = lambda chunk: None  # the fetch of a copy to be held failed: nothing is held
    timeline: Timeline = field(default_factory=Timeline)
    reclaim: Callable[[], bool] = lambda: False  # gives back HOST memory whose holder can do without; False if there is none

    def __post_init__(self) -> None:
        self._leases: dict[tuple[int, Tier], Lease] = {}
        self._homes: dict[int, Tier] = {}
        self._cached: dict[Tier, dict[int, Chunk]] = {Tier.DEVICE: {}, Tier.HOST: {}}
        self._marks: dict[int, object | None] = {}
        self.fetches = Fetches(self)
        self.nvme = NvmeHomes(self)

    # ---- homes

    def create(self, chunk: Chunk, places: Sequence[tuple[Tier, int]]) -> None:
        """Gives the chunk its permanent place, or several: (tier, bytes) of each in order, NVMe last. The bytes there are
        undefined until written.
        """
        home = Tier.NVME if len(places) > 1 else places[0][0]
        if home is Tier.NVME:
            self.nvme.create(chunk, [(tier, nbytes) for tier, nbytes in places if tier is not Tier.NVME])
        else:
            self._leases[chunk.id, home] = self.pools[home].resident.lease(chunk.nbytes)
        self._homes[chunk.id] = home
        self.ledger.apply(chunk, home, Event.CREATE)

    def home(self, chunk: Chunk) -> Tier:
        """The chunk's permanent tier. One that has several counts as NVMe's: it is in no memory as a whole, and is read and
        written there. Whether the drive has any of it says ``on_nvme``.
        """
        return self._homes[chunk.id]

    def homes(self, chunk: Chunk) -> list[Tier]:
        """Every tier that has some of the chunk for good."""
        return self.nvme.tiers(chunk) if self._homes[chunk.id] is Tier.NVME else [self._homes[chunk.id]]

    def on_nvme(self, chunk: Chunk) -> bool:
        """Whether NVMe has any of the chunk for good."""
        return Tier.NVME in self.homes(chunk)

    def at_home(self, chunk: Chunk, begin: int, end: int) -> list[torch.Tensor]:
        """Bytes [begin, end) of the home as views of the memory they are in, in order; none where NVMe has any of the chunk."""
        home = self._homes[chunk.id]
        if home is not Tier.NVME:
            return [self._leases[chunk.id, home].bytes()[begin:end]]
        return [there for _, there in self.nvme.kept(chunk, begin, end)] if self.nvme.in_memory(chunk) else []

    def cached(self, tier: Tier) -> list[Chunk]:
        """Chunks with a copy in the tier that may come and go."""
        return list(self._cached[tier].values())

    def memory(self, chunk: Chunk, tier: Tier) -> Lease:
        """The lease of a copy in a memory tier."""
        return self._leases[chunk.id, tier]

    # ---- what callers waited for

    def waited(self, lane: Lane, name: str, began: float) -> None:
        """The calling thread waited for READ or WRITE, for what ``name`` says, from ``began`` to now."""
        seconds = time.perf_counter() - began
        if lane is Lane.READ:
            self.traffic.wait_read += seconds
        else:
            self.traffic.wait_write += seconds
        self.timeline.wait(lane, name, began)

    def moves(self, lane: Lane, chunk: Chunk, ticket: Ticket, nbytes: int) -> None:
        """So many of the chunk's bytes have begun to move on a link."""
        self.traffic.add(lane, nbytes)
        self.timeline.follow(lane, self.timeline.name(chunk.id), ticket.times, nbytes)

    # ---- staging memory

    def scratch(self, tier: Tier, nbytes: int, victims: Victims, wait: bool = True) -> Lease:
        """Leases staging memory, evicting ``victims`` as needed. Raises CapacityError.

        ``wait``: it is needed now, so what comes up ahead of use gives way.
        """
        lease = self._lease(tier, nbytes, victims, wait)
        self.ledger.hold_scratch(tier, lease.nbytes)
        self.observer()
        return lease

    def drop_scratch(self, tier: Tier, lease: Lease) -> None:
        """Returns staging memory."""
        self.ledger.hold_scratch(tier, -lease.nbytes)
        lease.release()

    def _lease(self, tier: Tier, nbytes: int, victims: Victims, demand: bool = True) -> Lease:
        """``demand``: it is needed now, so what was taken ahead of use gives way. Raises CapacityError."""
        pool = self.pools[tier].working
        nbytes = -(-nbytes // IO_BYTES) * IO_BYTES
        reclaim = [self.reclaim] if tier is Tier.HOST else []
        ways = [*reclaim, self.fetches.give_way, lambda: self._compact(tier, nbytes)] if demand else []
        while True:
            with contextlib.suppress(CapacityError):
                return pool.lease(nbytes)
            given_up = self._cheapest(tier, nbytes, victims)
            if given_up is not None:
                for chunk in given_up:
                    self.evict(chunk, tier)
                continue
            while ways and not ways[0]():
                ways.pop(0)
            if not ways and self._cheapest(tier, nbytes, victims) is None and pool.largest < nbytes:
                raise CapacityError(
                    pool.name, nbytes, pool.free, pool.largest, self.ledger.pinned_bytes(tier),
                    f"Raise tierflow.{'device' if tier is Tier.DEVICE else 'host'}_memory",
                )  # fmt: skip

    def _cheapest(self, tier: Tier, nbytes: int, victims: Victims) -> list[Chunk] | None:
        """The copies to give up for a run of ``nbytes``; None if there is no such run. ``victims`` lists what may go, the
        farthest use first.
        """
        pool = self.pools[tier].working
        places = [Place(at, size, -1, None) for at, size in pool.runs]
        for rank, chunk in enumerate(victims(tier)):
            if self.evictable(chunk, tier):
                lease = self._leases[chunk.id, tier]
                if lease.pool is pool:
                    places.append(Place(lease.offset, lease.nbytes, rank, chunk))
        return cheapest(places, nbytes)

    def _compact(self, tier: Tier, nbytes: int) -> bool:
        """Moves copies together where enough is free, but not in one run; whether ``nbytes`` fit now.

        Only what is pinned is left when this is called: units that an outer module holds lie where there was room.
        """
        pool = self.pools[tier].working
        if tier is not Tier.DEVICE or pool.free < nbytes:
            return False
        here = [(lease.offset, i) for (i, t), lease in self._leases.items() if t is tier and lease.pool is pool]
        for _, i in sorted(here):
            chunk, lease = self.ledger.chunk(i), self._leases[i, tier]
            if chunk in self.fetches or self.busy_aliases(chunk, lease):
                continue
            data = lease.bytes().clone()
            lease.release()
            new = self._leases[i, tier] = pool.lease(data.numel(), lowest=True)
            new.bytes().copy_(data)
            self._marks.pop(i, None)
            self.on_move(chunk, new)
        self.lane.reuse_after(None)
        return pool.largest >= nbytes

    # ---- copies that come and go

    def begin_copy(self, chunk: Chunk, tier: Tier, victims: Victims, demand: bool) -> None:
        """Leases a copy's memory for the caller to fill, evicting ``victims`` as needed. Raises CapacityError.

        ``demand``: it is needed now, so what comes up ahead of use gives way.
        """
        self._leases[chunk.id, tier] = self._lease(tier, chunk.nbytes, victims, demand)
        self._cached[tier][chunk.id] = chunk
        self.ledger.apply(chunk, tier, Event.BEGIN_FILL)

    def abort_copy(self, chunk: Chunk, tier: Tier, keep: bool = False) -> None:
        """Drops a copy whose fill failed, if there is one. ``keep``: it has views, and stays where it is, stale."""
        if self.ledger.state(chunk, tier) is CopyState.FILLING:
            self.ledger.apply(chunk, tier, Event.ABORT_FILL)
            if not keep:
                self.ledger.apply(chunk, tier, Event.EVICT)
        # a lease whose fill had not begun is in no ledger
        if self.ledger.state(chunk, tier) is CopyState.ABSENT and (chunk.id, tier) in self._leases:
            self._leases.pop((chunk.id, tier)).release()
            self._cached[tier].pop(chunk.id, None)

    def evictable(self, chunk: Chunk, tier: Tier) -> bool:
        """Whether the copy may go: not the home, not pinned, not under way, no live alias."""
        lease = self._leases.get((chunk.id, tier))
        if lease is None or self._homes[chunk.id] is tier or self.ledger.pins(chunk, tier):
            return False
        if self.ledger.state(chunk, tier) is CopyState.FILLING or chunk in self.fetches:
            return False
        return tier is not Tier.DEVICE or not self.busy_aliases(chunk, lease)

    def evict(self, chunk: Chunk, tier: Tier) -> None:
        """Drops a cached copy; all caches are clean, so nothing is written."""
        if tier is Tier.DEVICE:
            self.on_evict(chunk)
        self.ledger.apply(chunk, tier, Event.EVICT)
        lease = self._leases.pop((chunk.id, tier))
        del self._cached[tier][chunk.id]
        lease.release()
        if tier is Tier.DEVICE:
            mark = self._marks.pop(chunk.id, None)
            # freed memory that is poisoned is written once more, behind the mark
            self.lane.reuse_after(mark if lease.pool.debug is None else None)
        self.observer()

    # ---- use on DEVICE

    def pin(self, chunk: Chunk) -> Lease:
        """The chunk's DEVICE copy, ready for the compute that is issued next, held until ``unpin``.

        The chunk must be there or under way. Without an accelerator this waits for the bytes; with one, for
        the NVMe read at most, and the compute stream waits for the rest.
        """
        self.fetches.before_use(chunk)
        self.ledger.pin(chunk, Tier.DEVICE)
        return self._leases[chunk.id, Tier.DEVICE]

    def unpin(self, chunk: Chunk) -> int:
        """Undoes one ``pin``; the copy stays cached. Returns how many pins are left."""
        left = self.ledger.unpin(chunk, Tier.DEVICE)
        if left == 0 and self._homes[chunk.id] is not Tier.DEVICE:
            if self.busy_aliases(chunk, self._leases[chunk.id, Tier.DEVICE]):
                self._marks.pop(chunk.id, None)  # it goes on being used
            else:
                self._marks[chunk.id] = self.lane.after_use()
        return left

    def lend(self, chunk: Chunk) -> Lease:
        """Like ``pin``, for the caller to make an alias of at once; that is what then holds the copy."""
        lease = self.pin(chunk)
        self.ledger.unpin(chunk, Tier.DEVICE)
        self._marks.pop(chunk.id, None)
        return lease

    def renew_home(self, chunk: Chunk) -> None:
        """All that was changed in a copy of the chunk has been written to its home, which may be read again."""
        home = self.home(chunk)
        if self.ledger.state(chunk, home) is CopyState.STALE:
            self.ledger.renew(chunk, home)

    def wrote(self, chunk: Chunk, tier: Tier) -> None:
        """The copy in ``tier`` is now the only true one: cached others are dropped."""
        for other in self.ledger.wrote(chunk, tier):
            if other is not self._homes[chunk.id] and self.evictable(chunk, other):
                self.evict(chunk, other)

    def drop_copies(self, chunk: Chunk) -> None:
        """Only the home is true: every copy of it goes, or is refilled where it is when it is wanted."""
        self.fetches.settle_chunk(chunk)
        home = self._homes[chunk.id]
        for tier in (Tier.DEVICE, Tier.HOST):
            if tier is home or self.ledger.state(chunk, tier) is CopyState.ABSENT:
                continue
            if self.evictable(chunk, tier):
                self.evict(chunk, tier)
            else:
                self.ledger.apply(chunk, tier, Event.INVALIDATE)

    def close(self) -> None:
        """Ends every transfer and gives all memory and disk back; errors of abandoned reads are dropped."""
        self.fetches.close()
        self.lane.close()
        for lease in self._leases.values():
            lease.release()
        self._leases.clear()
        self.nvme.close()
        self.ledger.forget()
        if self.store is not None:
            self.store.close()
            self.store = None
        for pools in self.pools.values():
            pools.resident.arena.close()
