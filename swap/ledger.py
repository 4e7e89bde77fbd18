"""The residency ledger: every copy state and pin count, and nothing else (no torch, no I/O).

Nobody else assigns a state. Invariants (``check``): a live chunk has at least one VALID copy; FILLING
means exactly one ticket; a pinned copy is never evicted; a tier's bytes never exceed its budget.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from tierflow.swap.types import Chunk, CopyState, LedgerError, Tier


class Event(enum.Enum):
    """What can happen to a copy."""

    __hash__ = object.__hash__

    CREATE = "create"  # the chunk's first copy comes into being, already valid
    BEGIN_FILL = "begin_fill"  # a ticket starts writing into the copy
    END_FILL = "end_fill"  # that ticket succeeded
    ABORT_FILL = "abort_fill"  # that ticket failed or was cancelled
    INVALIDATE = "invalidate"  # another copy was written
    EVICT = "evict"  # its memory is given back


_A, _F, _V, _S = CopyState.ABSENT, CopyState.FILLING, CopyState.VALID, CopyState.STALE

#: The transition table. What is not here is a LedgerError.
TRANSITIONS: Mapping[tuple[CopyState, Event], CopyState] = {
    (_A, Event.CREATE): _V,
    (_A, Event.BEGIN_FILL): _F,
    (_S, Event.BEGIN_FILL): _F,
    (_F, Event.END_FILL): _V,
    (_F, Event.ABORT_FILL): _S,
    (_V, Event.INVALIDATE): _S,
    (_S, Event.INVALIDATE): _S,
    (_V, Event.EVICT): _A,
    (_S, Event.EVICT): _A,
}


class Ledger:
    """Copy states, pins and bytes of every chunk in every tier. ``budgets`` are bytes per tier."""

    def __init__(self, budgets: Mapping[Tier, int]):
        self.budgets = dict(budgets)
        self._states: dict[tuple[int, Tier], CopyState] = {}
        self._pins: dict[tuple[int, Tier], int] = {}
        self._chunks: dict[int, Chunk] = {}
        self._scratch: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self._kept: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self._bytes: dict[Tier, int] = dict.fromkeys(Tier, 0)

    def state(self, chunk: Chunk, tier: Tier) -> CopyState:
        """State of the chunk's copy in the tier."""
        return self._states.get((chunk.id, tier), CopyState.ABSENT)

    def chunk(self, chunk_id: int) -> Chunk:
        """The chunk of that id."""
        return self._chunks[chunk_id]

    def valid(self, chunk: Chunk, tier: Tier) -> bool:
        """Whether the copy can be read."""
        return self.state(chunk, tier) is CopyState.VALID

    def apply(self, chunk: Chunk, tier: Tier, event: Event) -> CopyState:
        """Moves a copy along the transition table. Raises LedgerError for anything it does not hold."""
        old = self.state(chunk, tier)
        new = TRANSITIONS.get((old, event))
        if new is None:
            raise LedgerError(f"chunk {chunk.id} in {tier.name}: {event.name} is not allowed from {old.name}")
        self._guard(chunk, tier, event, old)
        self._chunks[chunk.id] = chunk
        self._states[chunk.id, tier] = new
        self._bytes[tier] += chunk.nbytes * ((new is not _A) - (old is not _A))
        return new

    def _guard(self, chunk: Chunk, tier: Tier, event: Event, old: CopyState) -> None:
        where = f"chunk {chunk.id} in {tier.name}"
        if event is Event.EVICT and self.pins(chunk, tier):
            raise LedgerError(f"{where} is pinned and cannot be evicted")
        loses_valid = event in (Event.EVICT, Event.INVALIDATE) and old is _V
        if loses_valid and not self._valid_elsewhere(chunk, tier):
            raise LedgerError(f"{where} is the last valid copy")
        if old is _A and self.held(tier) + chunk.nbytes > self.budgets[tier]:
            raise LedgerError(f"{where}: {chunk.nbytes} bytes would exceed the budget {self.budgets[tier]}")

    def _valid_elsewhere(self, chunk: Chunk, tier: Tier) -> bool:
        return any(self.valid(chunk, t) for t in Tier if t is not tier)

    def wrote(self, chunk: Chunk, tier: Tier) -> list[Tier]:
        """The copy in ``tier`` was written in place: every other copy becomes STALE. Returns their tiers."""
        if not self.valid(chunk, tier):
            raise LedgerError(f"chunk {chunk.id} in {tier.name} was written while not valid")
        others = [t for t in Tier if t is not tier and self.state(chunk, t) in (_V, _S)]
        for other in others:
            self.apply(chunk, other, Event.INVALIDATE)
        return others

    def renew(self, chunk: Chunk, tier: Tier) -> None:
        """A stale copy is true again: what the others have was written through to it, piece by piece."""
        self.apply(chunk, tier, Event.BEGIN_FILL)
        self.apply(chunk, tier, Event.END_FILL)

    def pins(self, chunk: Chunk, tier: Tier) -> int:
        """How many users hold the copy where it is."""
        return self._pins.get((chunk.id, tier), 0)

    def pin(self, chunk: Chunk, tier: Tier) -> int:
        """Holds a valid copy in place; returns the new count."""
        if not self.valid(chunk, tier):
            raise LedgerError(f"chunk {chunk.id} in {tier.name} is {self.state(chunk, tier).name}, not VALID")
        count = self.pins(chunk, tier) + 1
        self._pins[chunk.id, tier] = count
        return count

    def unpin(self, chunk: Chunk, tier: Tier) -> int:
        """Undoes one ``pin``; returns the new count."""
        count = self.pins(chunk, tier) - 1
        if count < 0:
            raise LedgerError(f"chunk {chunk.id} in {tier.name} was unpinned more often than pinned")
        self._pins[chunk.id, tier] = count
        return count

    def hold_scratch(self, tier: Tier, nbytes: int) -> None:
        """Counts staging memory that is no chunk's copy (pieces of the update pipeline); negative frees."""
        if nbytes > 0 and self.held(tier) + nbytes > self.budgets[tier]:
            raise LedgerError(f"scratch in {tier.name}: {nbytes} bytes would exceed {self.budgets[tier]}")
        self._scratch[tier] += nbytes

    def keep_in(self, tier: Tier, nbytes: int) -> None:
        """Counts so many bytes of what counts as on NVMe in the tier, for that is where they are."""
        if self.held(tier) + nbytes > self.budgets[tier]:
            raise LedgerError(f"{nbytes} bytes kept in {tier.name} would exceed {self.budgets[tier]}")
        self._kept[tier] += nbytes
        self._kept[Tier.NVME] -= nbytes

    def held(self, tier: Tier) -> int:
        """Bytes in the tier: copies that are not ABSENT, what is kept there of others, and scratch."""
        return self._bytes[tier] + self._kept[tier] + self._scratch[tier]

    def pinned_bytes(self, tier: Tier) -> int:
        """Bytes of the tier's pinned copies."""
        return sum(self._chunks[i].nbytes for (i, t), n in self._pins.items() if t is tier and n)

    def check(self) -> None:
        """Raises LedgerError if an invariant does not hold."""
        for cid, chunk in self._chunks.items():
            states = [self.state(chunk, t) for t in Tier]
            if _V not in states and any(s is not _A for s in states):
                raise LedgerError(f"chunk {cid} has no valid copy: {[s.name for s in states]}")
        for (cid, tier), count in self._pins.items():
            if count and not self.valid(self._chunks[cid], tier):
                raise LedgerError(f"chunk {cid} is pinned in {tier.name} but not valid there")
        for tier in Tier:
            total = sum(c.nbytes for c in self._chunks.values() if self.state(c, tier) is not _A)
            if total + self._kept[tier] + self._scratch[tier] != self.held(tier) or self.held(tier) > self.budgets[tier]:
                raise LedgerError(f"{tier.name}: {self.held(tier)} bytes held, budget {self.budgets[tier]}")

    def forget(self) -> None:
        """Drops every record: the end of an engine."""
        for table in (self._states, self._pins, self._chunks):
            table.clear()
        for counts in (self._bytes, self._kept, self._scratch):
            counts.update(dict.fromkeys(Tier, 0))
