"""Moves chunks between tiers and keeps the ledger true while it does.

The manager acts; it does not choose. What to give up when a tier is full comes from the caller as an
ordered list of victims, and what to bring up comes as calls of ``fetch``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from tierflow.aio import Extent, Store
from tierflow.swap.lanes import DeviceLane, Ticket, finish
from tierflow.swap.ledger import Event, Ledger
from tierflow.swap.pool import Lease, Pool
from tierflow.swap.room import Place, cheapest
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


@dataclass(eq=False)
class Fetch:
    """A chunk on its way up: NVMe -> ``landing`` by ``read``, then HOST -> DEVICE by ``fill``."""

    chunk: Chunk
    target: Tier
    landing: Tier = Tier.HOST
    read: Ticket | None = None
    fill: Ticket | None = None
    unpin_host: bool = False
    in_place: bool = False  # refills a stale device copy that has views
    begun: bool = False  # it has all the memory that it needs
    holds: int = 0  # pins that the copy gets as soon as it is valid


@dataclass
class Manager:
    """Every copy's memory, the fetches under way, and the counters."""

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
    reclaim: Callable[[], bool] = lambda: False  # gives back memory that was taken ahead of need; False if there is none

    def __post_init__(self) -> None:
        self._leases: dict[tuple[int, Tier], Lease] = {}
        self._extents: dict[int, Extent] = {}
        self._spares: dict[int, Extent] = {}
        self._homes: dict[int, Tier] = {}
        self._cached: dict[Tier, dict[int, Chunk]] = {Tier.DEVICE: {}, Tier.HOST: {}}
        self._fetches: dict[int, Fetch] = {}
        self._marks: dict[int, object | None] = {}

    # ---- homes

    def create(self, chunk: Chunk, home: Tier) -> None:
        """Gives the chunk its permanent place. The bytes there are undefined until written."""
        if home is Tier.NVME:
            assert self.store is not None
            self._extents[chunk.id] = self.store.allocate(chunk.nbytes)
        else:
            self._leases[chunk.id, home] = self.pools[home].resident.lease(chunk.nbytes)
        self._homes[chunk.id] = home
        self.ledger.apply(chunk, home, Event.CREATE)

    def add_spare(self, chunk: Chunk) -> None:
        """Gives the chunk a second slot on NVMe."""
        assert self.store is not None
        self._spares[chunk.id] = self.store.allocate(chunk.nbytes)

    def has_spare(self, chunk: Chunk) -> bool:
        """Whether the chunk has a second slot."""
        return chunk.id in self._spares

    def flip(self, chunk: Chunk) -> None:
        """The chunk's second slot becomes its home, and the home the second slot."""
        self._extents[chunk.id], self._spares[chunk.id] = self._spares[chunk.id], self._extents[chunk.id]

    def home(self, chunk: Chunk) -> Tier:
        """The chunk's permanent tier."""
        return self._homes[chunk.id]

    def cached(self, tier: Tier) -> list[Chunk]:
        """Chunks with a copy in the tier that may come and go."""
        return list(self._cached[tier].values())

    def memory(self, chunk: Chunk, tier: Tier) -> Lease:
        """The lease of a copy in a memory tier."""
        return self._leases[chunk.id, tier]

    # ---- raw NVMe transfers of a piece of a chunk's home

    def read(self, chunk: Chunk, dst: torch.Tensor, begin: int = 0, spare: bool = False) -> Ticket:
        """Starts reading ``dst.nbytes`` bytes at byte ``begin`` of the chunk's extent (or second slot) into memory."""
        assert self.store is not None
        self.traffic.nvme_read += dst.nbytes
        ticket = self.store.read(dst, (self._spares if spare else self._extents)[chunk.id].offset + begin)
        self.timeline.follow(Lane.READ, self.timeline.name(chunk.id), ticket.times, dst.nbytes)
        return ticket

    def write(
        self, chunk: Chunk, src: torch.Tensor, begin: int = 0, spare: bool = False, urgent: bool = False
    ) -> Ticket:
        """Starts writing ``src`` at byte ``begin`` of the chunk's extent (or second slot).

        ``urgent``: the memory is wanted for something else.
        """
        assert self.store is not None
        self.traffic.nvme_written += src.nbytes
        ticket = self.store.write(src, (self._spares if spare else self._extents)[chunk.id].offset + begin, urgent=urgent)
        self.timeline.follow(Lane.WRITE, self.timeline.name(chunk.id), ticket.times, src.nbytes)
        return ticket

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
        ways = [self.reclaim, self._end_fetches, lambda: self._compact(tier, nbytes)] if demand else []
        while True:
            with contextlib.suppress(CapacityError):
                return pool.lease(nbytes)
            given_up = self._cheapest(tier, nbytes, victims)
            if given_up is not None:
                for chunk in given_up:
                    self.evict(chunk, tier)
                continue
            while ways and not ways.pop(0)():
                pass
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
            if i in self._fetches or self.busy_aliases(chunk, lease):
                continue
            data = lease.bytes().clone()
            lease.release()
            new = self._leases[i, tier] = pool.lease(data.numel(), lowest=True)
            new.bytes().copy_(data)
            self._marks.pop(i, None)
            self.on_move(chunk, new)
        self.lane.reuse_after(None)
        return pool.largest >= nbytes

    def evictable(self, chunk: Chunk, tier: Tier) -> bool:
        """Whether the copy may go: not the home, not pinned, not under way, no live alias."""
        lease = self._leases.get((chunk.id, tier))
        if lease is None or self._homes[chunk.id] is tier or self.ledger.pins(chunk, tier):
            return False
        if self.ledger.state(chunk, tier) is CopyState.FILLING or chunk.id in self._fetches:
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

    # ---- fetch to DEVICE

    def fetching(self) -> int:
        """Fetches under way."""
        return len(self._fetches)

    def fetching_bytes(self) -> int:
        """Their bytes."""
        return sum(fetch.chunk.nbytes for fetch in self._fetches.values())

    def is_fetching(self, chunk: Chunk) -> bool:
        """Whether the chunk is on its way to DEVICE."""
        return chunk.id in self._fetches

    def fetch(
        self, chunk: Chunk, victims: Victims, hint: bool = False, target: Tier = Tier.DEVICE, hold: bool = False
    ) -> bool:
        """Starts bringing the chunk to ``target`` unless it is there or under way. Raises CapacityError.

        ``hint``: it is wanted later. Then nothing is waited for, and False says that there was no room (the chunk
        may be on its way to HOST then). ``hold``: pins the copy as soon as it is valid; ``unpin`` undoes it.
        """
        fetch = self._fetches.get(chunk.id)
        if fetch is not None and fetch.target is not target:
            if hint:
                return False
            self._end(fetch)
        if chunk.id not in self._fetches and not self.ledger.valid(chunk, target) and not self._start(
            Fetch(chunk, target), victims, hint
        ):
            return False
        if hold and chunk.id in self._fetches:
            self._fetches[chunk.id].holds += 1
        elif hold:
            self.ledger.pin(chunk, target)
        return True

    def _start(self, fetch: Fetch, victims: Victims, hint: bool) -> bool:
        chunk, wanted = fetch.chunk, fetch.target
        self._fetches[chunk.id] = fetch
        try:
            if wanted is Tier.DEVICE and self.lane.direct and not self.ledger.valid(chunk, Tier.HOST):
                self._begin_device(fetch, victims, not hint)
                fetch.landing = Tier.DEVICE
                fetch.read = self.read(chunk, self._leases[chunk.id, Tier.DEVICE].bytes()[: chunk.nbytes])
            else:
                if not self.ledger.valid(chunk, Tier.HOST):
                    self._begin_host(fetch, victims, not hint)
                if wanted is Tier.DEVICE:
                    self._begin_device(fetch, victims, not hint)
        except CapacityError:
            if not hint:
                self._abort(fetch)
                raise
            if fetch.read is None:
                self._abort(fetch)
            else:
                fetch.target = Tier.HOST
        except BaseException:
            self._abort(fetch)
            raise
        fetch.begun = True
        self.observer()
        if chunk.id in self._fetches:
            self._advance(fetch)
        return fetch.target is wanted and (chunk.id in self._fetches or self.ledger.valid(chunk, wanted))

    def _begin_host(self, fetch: Fetch, victims: Victims, wait: bool) -> None:
        chunk = fetch.chunk
        if self.ledger.state(chunk, Tier.HOST) is CopyState.STALE:
            self.evict(chunk, Tier.HOST)
        lease = self._lease(Tier.HOST, chunk.nbytes, victims, wait)
        self._leases[chunk.id, Tier.HOST] = lease
        self._cached[Tier.HOST][chunk.id] = chunk
        self.ledger.apply(chunk, Tier.HOST, Event.BEGIN_FILL)
        fetch.read = self.read(chunk, lease.bytes()[: chunk.nbytes])

    def _begin_device(self, fetch: Fetch, victims: Victims, wait: bool) -> None:
        chunk = fetch.chunk
        if self.ledger.valid(chunk, Tier.HOST):
            self._pin_host(fetch)  # it must not be chosen as a victim for its own device copy
        # a stale copy that somebody still has a view of is refilled where it is: the view follows the weight
        if self.ledger.state(chunk, Tier.DEVICE) is CopyState.STALE:
            fetch.in_place = True
            self.lane.reuse_after(None)
        else:
            self._leases[chunk.id, Tier.DEVICE] = self._lease(Tier.DEVICE, chunk.nbytes, victims, wait)
            self._cached[Tier.DEVICE][chunk.id] = chunk
        self.ledger.apply(chunk, Tier.DEVICE, Event.BEGIN_FILL)

    def _pin_host(self, fetch: Fetch) -> None:
        self.ledger.pin(fetch.chunk, Tier.HOST)
        fetch.unpin_host = True

    def _unpin_host(self, fetch: Fetch) -> None:
        if fetch.unpin_host:
            self.ledger.unpin(fetch.chunk, Tier.HOST)
            fetch.unpin_host = False

    def _end_read(self, fetch: Fetch, read: Ticket) -> None:
        began = time.perf_counter()
        try:
            finish(read)
        except BaseException:
            fetch.read = None
            self._abort(fetch)
            raise
        fetch.read = None
        self.timeline.wait(Lane.READ, self.timeline.name(fetch.chunk.id), began)
        self.ledger.apply(fetch.chunk, fetch.landing, Event.END_FILL)
        if fetch.target is not fetch.landing:
            self._pin_host(fetch)

    def _abort(self, fetch: Fetch) -> None:
        """Gives back what a failed fetch had taken, once nothing writes there any more."""
        chunk = fetch.chunk
        self._fetches.pop(chunk.id, None)
        if fetch.read is not None:
            with contextlib.suppress(OSError):
                finish(fetch.read)
        self._unpin_host(fetch)
        if fetch.holds:
            self.on_lost(chunk)
        for tier in (Tier.HOST, Tier.DEVICE):
            filling = self.ledger.state(chunk, tier) is CopyState.FILLING
            if filling:
                self.ledger.apply(chunk, tier, Event.ABORT_FILL)
            if filling and not (fetch.in_place and tier is Tier.DEVICE):
                self.ledger.apply(chunk, tier, Event.EVICT)
            # a lease whose fill had not begun is in no ledger
            if self.ledger.state(chunk, tier) is CopyState.ABSENT and (chunk.id, tier) in self._leases:
                self._leases.pop((chunk.id, tier)).release()
                self._cached[tier].pop(chunk.id, None)
        self.lane.reuse_after(None)

    def _end_fetches(self) -> bool:
        """Waits for what is under way to DEVICE, whose memory nobody could take; whether there was anything."""
        found = [f for f in self._fetches.values() if f.begun]
        for fetch in found:
            self._end(fetch)
        return bool(found)

    def _end(self, fetch: Fetch) -> None:
        self._advance(fetch, block=True)
        if fetch.fill is not None and fetch.chunk.id in self._fetches:
            began = time.perf_counter()
            finish(fetch.fill)
            self.timeline.wait(Lane.TO_DEVICE, self.timeline.name(fetch.chunk.id), began)
            self._filled(fetch)

    def _advance(self, fetch: Fetch, block: bool = False) -> None:
        """Carries a fetch as far as it goes without waiting, or (``block``) to where compute may use it."""
        if fetch.read is not None:
            if not (block or fetch.read.done()):
                return
            began = time.perf_counter()
            self._end_read(fetch, fetch.read)
            self.traffic.wait_read += time.perf_counter() - began
        if fetch.target is fetch.landing:
            self._filled(fetch)
            return
        if fetch.fill is None:
            self._fill(fetch)
        if fetch.fill is not None and fetch.fill.done():
            finish(fetch.fill)
            self._filled(fetch)

    def _fill(self, fetch: Fetch) -> None:
        chunk, began = fetch.chunk, time.perf_counter()
        source = self._leases[chunk.id, Tier.HOST].bytes()[: chunk.nbytes]
        target = self._leases[chunk.id, Tier.DEVICE].bytes()[: chunk.nbytes]
        fetch.fill = self.lane.fill(target, source)
        self.timeline.follow(Lane.TO_DEVICE, self.timeline.name(chunk.id), fetch.fill.times, chunk.nbytes)
        self.traffic.to_device += chunk.nbytes
        self.traffic.wait_device += time.perf_counter() - began

    def _filled(self, fetch: Fetch) -> None:
        """The copy is where it was wanted."""
        self._unpin_host(fetch)
        if self.ledger.state(fetch.chunk, fetch.target) is CopyState.FILLING:
            self.ledger.apply(fetch.chunk, fetch.target, Event.END_FILL)
        for _ in range(fetch.holds):
            self.ledger.pin(fetch.chunk, fetch.target)
        del self._fetches[fetch.chunk.id]

    def pump(self) -> None:
        """Advances every fetch that can advance without waiting."""
        for fetch in list(self._fetches.values()):
            self._advance(fetch)

    def pin(self, chunk: Chunk) -> Lease:
        """The chunk's DEVICE copy, ready for the compute that is issued next, held until ``unpin``.

        The chunk must be there or under way. Without an accelerator this waits for the bytes; with one, for
        the NVMe read at most, and the compute stream waits for the rest.
        """
        fetch = self._fetches.get(chunk.id)
        if fetch is not None:
            self._advance(fetch, block=True)
            if fetch.fill is not None and chunk.id in self._fetches:
                stall = self.lane.before_use(fetch.fill)
                if stall is not None:
                    self.timeline.follow(Lane.TO_DEVICE, self.timeline.name(chunk.id), stall, wait=True)
                # ordered by the event: valid for everything issued from here on
                if self.ledger.state(chunk, Tier.DEVICE) is CopyState.FILLING:
                    self.ledger.apply(chunk, Tier.DEVICE, Event.END_FILL)
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

    def let_go(self, chunk: Chunk, tier: Tier) -> None:
        """Undoes the ``hold`` of a fetch."""
        fetch = self._fetches.get(chunk.id)
        if fetch is not None and fetch.holds:
            fetch.holds -= 1
        elif tier is Tier.DEVICE:
            self.unpin(chunk)
        else:
            self.ledger.unpin(chunk, tier)

    def lend(self, chunk: Chunk) -> Lease:
        """Like ``pin``, for the caller to make an alias of at once; that is what then holds the copy."""
        lease = self.pin(chunk)
        self.ledger.unpin(chunk, Tier.DEVICE)
        self._marks.pop(chunk.id, None)
        return lease

    def wrote(self, chunk: Chunk, tier: Tier) -> None:
        """The copy in ``tier`` is now the only true one: cached others are dropped."""
        for other in self.ledger.wrote(chunk, tier):
            if other is not self._homes[chunk.id] and self.evictable(chunk, other):
                self.evict(chunk, other)

    def drop_copies(self, chunk: Chunk) -> None:
        """Only the home is true: every copy of it goes, or is refilled where it is when it is wanted."""
        self.settle_chunk(chunk)
        home = self._homes[chunk.id]
        for tier in (Tier.DEVICE, Tier.HOST):
            if tier is home or self.ledger.state(chunk, tier) is CopyState.ABSENT:
                continue
            if self.evictable(chunk, tier):
                self.evict(chunk, tier)
            else:
                self.ledger.apply(chunk, tier, Event.INVALIDATE)

    def settle_chunk(self, chunk: Chunk) -> None:
        """Waits for the chunk's fetch, if one is under way: its home is about to be written."""
        fetch = self._fetches.get(chunk.id)
        if fetch is not None:
            self._end(fetch)

    def settle(self) -> None:
        """Waits for every fetch under way."""
        for fetch in list(self._fetches.values()):
            self._end(fetch)

    def close(self) -> None:
        """Ends every transfer and gives all memory and disk back; errors of abandoned reads are dropped."""
        for fetch in list(self._fetches.values()):
            for ticket in (fetch.read, fetch.fill):
                if ticket is not None:
                    _quietly(ticket)
        self._fetches.clear()
        self.lane.close()
        for lease in self._leases.values():
            lease.release()
        self._leases.clear()
        self.ledger.forget()
        if self.store is not None:
            self.store.close()
            self.store = None


def _quietly(ticket: Ticket) -> None:
    with contextlib.suppress(OSError):
        ticket.wait()
