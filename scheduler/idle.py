"""Memory of gradients that hold nothing, as staging memory of the update.

From a unit's update to its next backward its gradient's memory is idle: under a deferred update most of the forward and,
for the units that are used first, most of the backward too. What the forward computed waits there for the drive, which
writes it while the backward leaves it alone; else the forward would wait for those writes.
"""

from __future__ import annotations

from collections.abc import Callable

from tierflow.scheduler.gradients import GradSlot, WatchedGradients
from tierflow.scheduler.units import Unit
from tierflow.swap import CapacityError, DebugMemory, Lease, Pool


class IdleGradients:
    """Lends the memory of units whose update has run, while no parameter of theirs has a gradient.

    A user who kept a gradient's handle or a view of it, and only then set ``p.grad = None``, still sees that gradient: its
    memory is not lent.
    """

    def __init__(self, debug: DebugMemory | None = None):
        self._debug = debug
        self._pool: Pool | None = None
        self._memory: dict[int, tuple[Lease, WatchedGradients]] = {}
        self._rested: list[int] = []  # updated, in this order, and not lent yet
        self._lent: set[int] = set()
        self._closed = False

    def register(self, unit: Unit, memory: Lease, slots: list[GradSlot]) -> None:
        """The unit's gradients are in ``memory``, of which only ``slots`` know."""
        self._pool = self._pool or Pool("host (idle gradients)", memory.pool.arena, 0, 0, self._debug)
        self._memory[unit.index] = memory, WatchedGradients(slots)

    def rest(self, unit: Unit) -> None:
        """The unit's update has run: nobody needs its gradient."""
        if unit.index in self._memory and unit.index not in self._lent and unit.index not in self._rested:
            self._rested.append(unit.index)

    def offers(self, nbytes: int) -> bool:
        """Whether so many bytes in a row can be had."""
        pool = self._open()
        return pool is not None and pool.largest >= nbytes

    def free(self) -> int:
        """Bytes that can be had, not all in a row."""
        pool = self._open()
        return 0 if pool is None else pool.free

    def _open(self) -> Pool | None:
        """The pool, with all that has come to rest; None while nothing is lent."""
        if self._pool is None or self._closed:
            return None
        while self._rested and self._memory[self._rested[0]][1].idle():
            index = self._rested.pop(0)
            lease = self._memory[index][0]
            self._pool.add(lease.offset, lease.nbytes)
            self._lent.add(index)
        return self._pool

    def lease(self, nbytes: int) -> Lease | None:
        """Memory for a while, or None. Of what there is, that of the earliest unit: its backward comes last."""
        if not nbytes or not self.offers(nbytes):
            return None
        assert self._pool is not None
        try:
            return self._pool.lease(nbytes, lowest=self._debug is None)
        except CapacityError:
            return None

    def lends(self, lease: Lease | None) -> bool:
        """Whether the lease is one of these."""
        return lease is not None and lease.pool is self._pool

    def take_back(self, unit: Unit, empty: Callable[[Callable[[Lease], bool]], None]) -> None:
        """The unit's gradient comes. ``empty`` is to end whatever uses memory of which its argument is true."""
        if unit.index in self._rested:
            self._rested.remove(unit.index)
        if unit.index not in self._lent:
            return
        assert self._pool is not None
        memory = self._memory[unit.index][0]
        begin, end = memory.offset, memory.offset + memory.nbytes
        self._closed = True  # what `empty` starts is not to come here
        try:
            empty(lambda lease: self.lends(lease) and lease.offset < end and begin < lease.offset + lease.nbytes)
        finally:
            self._closed = False
        self._pool.remove(begin, memory.nbytes)
        self._lent.discard(unit.index)

    def close(self) -> None:
        """Lets go of the memory."""
        self._memory.clear()
        self._rested.clear()
        self._lent.clear()
        self._pool = None
