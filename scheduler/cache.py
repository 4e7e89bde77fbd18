"""The caching rule of DEVICE's working memory, run over an order of use without moving bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from tierflow.scheduler.placement import AHEAD
from tierflow.scheduler.trace import Trace
from tierflow.scheduler.units import Unit


@dataclass
class Use:
    """One use of a unit, and the units whose weights start to come, or go, there."""

    unit: int
    fetched: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


class Cache:
    """DEVICE's working pool: which units it holds, and what it would give up, as ``Engine.victims`` has it."""

    def __init__(self, capacity: int, streamed: list[Unit]):
        self.capacity, self.held = capacity, set[int]()
        self._sizes = {u.index: u.chunk.nbytes for u in streamed}

    def passes(self, trace: Trace, prefetch: bool) -> tuple[set[int], list[int]]:
        """What is held after, and what was fetched in, a step that starts from what the one before left."""
        uses = self.uses(trace, prefetch)
        return self.held, [unit for use in uses for unit in use.fetched]

    def uses(self, trace: Trace, prefetch: bool) -> list[Use]:
        """What comes and goes at each use of a step that starts from what the one before left."""
        found: list[Use] = []
        for _ in range(3):
            found = []
            trace.rewind()
            for unit in trace.order:
                trace.visit(unit)
                found.append(Use(unit))
                if unit not in self._sizes:
                    continue
                self._bring(unit, {unit}, trace, found[-1])
                for soon in self._ahead(trace) if prefetch else []:
                    if not self._bring(soon, {unit}, trace, found[-1], trace.next_use(soon)):
                        break
        return found

    def _ahead(self, trace: Trace) -> list[int]:
        coming = [u for u in dict.fromkeys(trace.upcoming(2 * AHEAD)) if u in self._sizes and u not in self.held]
        return coming[:AHEAD]

    def _bring(self, unit: int, keep: set[int], trace: Trace, use: Use, beyond: int = -1) -> bool:
        if unit in self.held:
            return True
        used = sum(self._sizes[u] for u in self.held)
        for victim in sorted(self.held - keep, key=trace.next_use, reverse=True):
            if used + self._sizes[unit] <= self.capacity or trace.next_use(victim) <= beyond:
                break
            self.held.discard(victim)
            use.dropped.append(victim)
            used -= self._sizes[victim]
        if used + self._sizes[unit] > self.capacity:
            return False
        self.held.add(unit)
        use.fetched.append(unit)
        return True
