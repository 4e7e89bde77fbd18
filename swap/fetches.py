"""Brings chunks up, NVMe -> HOST -> DEVICE, each step behind the one before and none waited for until it must be.

The copies and their memory are the manager's, also those that are being filled; here is what fills them.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tierflow.swap.ledger import Event
from tierflow.swap.tickets import Ticket, finish
from tierflow.swap.timeline import Lane
from tierflow.swap.types import CapacityError, Chunk, CopyState, Tier

if TYPE_CHECKING:
    from tierflow.swap.manager import Manager, Victims


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


class Fetches:
    """The fetches under way, one a chunk at most."""

    def __init__(self, manager: Manager):
        self._manager = manager  # asked each time for what others replace: its counters and callbacks
        self._ledger, self._lane, self._timeline = manager.ledger, manager.lane, manager.timeline
        self._under_way: dict[int, Fetch] = {}

    def __contains__(self, chunk: Chunk) -> bool:
        """Whether the chunk is on its way up."""
        return chunk.id in self._under_way

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def nbytes(self) -> int:
        """Bytes of all the chunks under way."""
        return sum(fetch.chunk.nbytes for fetch in self._under_way.values())

    # ---- begin

    def start(
        self, chunk: Chunk, victims: Victims, hint: bool = False, target: Tier = Tier.DEVICE, hold: bool = False
    ) -> bool:
        """Starts bringing the chunk to ``target`` unless it is there or under way. Raises CapacityError.

        ``hint``: it is wanted later. Then nothing is waited for, and False says that there was no room (the chunk
        may be on its way to HOST then). ``hold``: pins the copy as soon as it is valid; ``let_go`` undoes it.
        """
        fetch = self._under_way.get(chunk.id)
        if fetch is not None and fetch.target is not target:
            if hint:
                return False
            self._end(fetch)
        there = chunk in self or self._ledger.valid(chunk, target)
        if not there and not self._begin(Fetch(chunk, target), victims, hint):
            return False
        if hold and chunk in self:
            self._under_way[chunk.id].holds += 1
        elif hold:
            self._ledger.pin(chunk, target)
        return True

    def _begin(self, fetch: Fetch, victims: Victims, hint: bool) -> bool:
        chunk, wanted = fetch.chunk, fetch.target
        self._under_way[chunk.id] = fetch
        try:
            self._take_memory(fetch, victims, not hint)
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
        self._manager.observer()
        if chunk in self:
            self._advance(fetch)
        return fetch.target is wanted and (chunk in self or self._ledger.valid(chunk, wanted))

    def _take_memory(self, fetch: Fetch, victims: Victims, demand: bool) -> None:
        """Begins the copies that the chunk lacks; the read starts as soon as there is memory for it."""
        if self._ledger.valid(fetch.chunk, Tier.HOST):
            self._pin_host(fetch)  # it must not be chosen as a victim for its own device copy
            self._begin_device(fetch, victims, demand)
        elif fetch.target is Tier.DEVICE and self._manager.nvme.in_memory(fetch.chunk):
            self._begin_device(fetch, victims, demand)
        elif fetch.target is Tier.DEVICE and self._lane.direct:
            self._begin_device(fetch, victims, demand)
            fetch.landing = Tier.DEVICE
            self._read(fetch)
        else:
            self._begin_host(fetch, victims, demand)
            self._read(fetch)
            if fetch.target is Tier.DEVICE:
                self._begin_device(fetch, victims, demand)

    def _begin_host(self, fetch: Fetch, victims: Victims, demand: bool) -> None:
        if self._ledger.state(fetch.chunk, Tier.HOST) is CopyState.STALE:
            self._manager.evict(fetch.chunk, Tier.HOST)
        self._manager.begin_copy(fetch.chunk, Tier.HOST, victims, demand)

    def _begin_device(self, fetch: Fetch, victims: Victims, demand: bool) -> None:
        # a stale copy that somebody still has a view of is refilled where it is: the view follows the weight
        if self._ledger.state(fetch.chunk, Tier.DEVICE) is CopyState.STALE:
            fetch.in_place = True
            self._lane.reuse_after(None)
            self._ledger.apply(fetch.chunk, Tier.DEVICE, Event.BEGIN_FILL)
        else:
            self._manager.begin_copy(fetch.chunk, Tier.DEVICE, victims, demand)

    def _read(self, fetch: Fetch) -> None:
        fetch.read = self._manager.nvme.read(fetch.chunk, self._bytes(fetch.chunk, fetch.landing), tier=fetch.landing)

    def _bytes(self, chunk: Chunk, tier: Tier) -> torch.Tensor:
        return self._manager.memory(chunk, tier).bytes()[: chunk.nbytes]

    # ---- progress

    def pump(self) -> None:
        """Advances every fetch that can advance without waiting."""
        for fetch in list(self._under_way.values()):
            self._advance(fetch)

    def _advance(self, fetch: Fetch, block: bool = False) -> None:
        """Carries a fetch as far as it goes without waiting, or (``block``) to where compute may use it."""
        if fetch.read is not None:
            if not (block or fetch.read.done()):
                return
            self._end_read(fetch, fetch.read)
        if fetch.target is fetch.landing:
            self._filled(fetch)
            return
        if fetch.fill is None:
            self._fill(fetch)
        if fetch.fill is not None and fetch.fill.done():
            finish(fetch.fill)
            self._filled(fetch)

    def _end_read(self, fetch: Fetch, read: Ticket) -> None:
        began = time.perf_counter()
        try:
            finish(read)
        except BaseException:
            fetch.read = None
            self._abort(fetch)
            raise
        fetch.read = None
        self._manager.waited(Lane.READ, self._timeline.name(fetch.chunk.id), began)
        self._ledger.apply(fetch.chunk, fetch.landing, Event.END_FILL)
        if fetch.target is not fetch.landing:
            self._pin_host(fetch)

    def _fill(self, fetch: Fetch) -> None:
        chunk, began = fetch.chunk, time.perf_counter()
        if self._manager.nvme.in_memory(chunk):
            fetch.fill = self._manager.nvme.read(chunk, self._bytes(chunk, Tier.DEVICE), tier=Tier.DEVICE)
        else:
            fetch.fill = self._lane.fill(self._bytes(chunk, Tier.DEVICE), self._bytes(chunk, Tier.HOST))
            self._manager.moves(Lane.TO_DEVICE, chunk, fetch.fill, chunk.nbytes)
        self._manager.traffic.wait_device += time.perf_counter() - began

    def _filled(self, fetch: Fetch) -> None:
        """The copy is where it was wanted."""
        self._unpin_host(fetch)
        if self._ledger.state(fetch.chunk, fetch.target) is CopyState.FILLING:
            self._ledger.apply(fetch.chunk, fetch.target, Event.END_FILL)
        for _ in range(fetch.holds):
            self._ledger.pin(fetch.chunk, fetch.target)
        del self._under_way[fetch.chunk.id]

    def _pin_host(self, fetch: Fetch) -> None:
        self._ledger.pin(fetch.chunk, Tier.HOST)
        fetch.unpin_host = True

    def _unpin_host(self, fetch: Fetch) -> None:
        if fetch.unpin_host:
            self._ledger.unpin(fetch.chunk, Tier.HOST)
            fetch.unpin_host = False

    # ---- end

    def before_use(self, chunk: Chunk) -> None:
        """Orders the compute that is issued next behind the chunk's fetch, if one is under way (``Manager.pin``)."""
        fetch = self._under_way.get(chunk.id)
        if fetch is None:
            return
        self._advance(fetch, block=True)
        if fetch.fill is not None and chunk in self:
            stall = self._lane.before_use(fetch.fill)
            if stall is not None:
                self._timeline.follow(Lane.TO_DEVICE, self._timeline.name(chunk.id), stall, wait=True)
            # ordered by the event: valid for everything issued from here on
            if self._ledger.state(chunk, Tier.DEVICE) is CopyState.FILLING:
                self._ledger.apply(chunk, Tier.DEVICE, Event.END_FILL)

    def let_go(self, chunk: Chunk, tier: Tier) -> None:
        """Undoes the ``hold`` of a fetch."""
        fetch = self._under_way.get(chunk.id)
        if fetch is not None and fetch.holds:
            fetch.holds -= 1
        elif tier is Tier.DEVICE:
            self._manager.unpin(chunk)
        else:
            self._ledger.unpin(chunk, tier)

    def settle_chunk(self, chunk: Chunk) -> None:
        """Waits for the chunk's fetch, if one is under way: its home is about to be written."""
        fetch = self._under_way.get(chunk.id)
        if fetch is not None:
            self._end(fetch)

    def settle(self) -> None:
        """Waits for every fetch under way."""
        for fetch in list(self._under_way.values()):
            self._end(fetch)

    def give_way(self) -> bool:
        """Waits for all that have their memory, so that it may be given up; whether there was any."""
        found = [fetch for fetch in self._under_way.values() if fetch.begun]
        for fetch in found:
            self._end(fetch)
        return bool(found)

    def _end(self, fetch: Fetch) -> None:
        self._advance(fetch, block=True)
        if fetch.fill is not None and fetch.chunk in self:
            began = time.perf_counter()
            finish(fetch.fill)
            self._timeline.wait(Lane.TO_DEVICE, self._timeline.name(fetch.chunk.id), began)
            self._filled(fetch)

    def _abort(self, fetch: Fetch) -> None:
        """Gives back what a failed fetch had taken, once nothing writes there any more."""
        self._under_way.pop(fetch.chunk.id, None)
        if fetch.read is not None:
            with contextlib.suppress(OSError):
                finish(fetch.read)
        self._unpin_host(fetch)
        if fetch.holds:
            self._manager.on_lost(fetch.chunk)
        self._manager.abort_copy(fetch.chunk, Tier.HOST)
        self._manager.abort_copy(fetch.chunk, Tier.DEVICE, keep=fetch.in_place)
        self._lane.reuse_after(None)

    def close(self) -> None:
        """Waits until nothing is written any more and forgets every fetch; errors of abandoned reads are dropped."""
        for fetch in list(self._under_way.values()):
            for ticket in (fetch.read, fetch.fill):
                if ticket is not None:
                    with contextlib.suppress(OSError):
                        ticket.wait()
        self._under_way.clear()
