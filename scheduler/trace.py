"""The observed order of use, a cursor in it, and what it says about the next use of each unit."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

#: Further from use than anything in a trace.
NEVER = 1 << 60


class Trace:
    """A cyclic order of unit indices with a cursor. It predicts; it never decides what is right."""

    def __init__(self, order: list[int]):
        self.order = order
        self.cursor = -1
        self._where: dict[int, list[int]] = {}
        for position, unit in enumerate(order):
            self._where.setdefault(unit, []).append(position)

    def visit(self, unit: int) -> bool:
        """Moves the cursor to the unit's next occurrence; False if the trace did not foresee it there."""
        distance = self.next_use(unit)
        if distance == NEVER:
            return False
        self.cursor = (self.cursor + distance) % len(self.order)
        return distance == 1

    def next_use(self, unit: int) -> int:
        """How many uses ahead the unit comes up again (at least 1), or NEVER."""
        places = self._where.get(unit)
        if not places:
            return NEVER
        at = bisect.bisect_right(places, self.cursor)
        if at < len(places):
            return places[at] - self.cursor
        return places[0] + len(self.order) - self.cursor

    def comes_again(self, unit: int) -> bool:
        """Whether the unit is used once more before the order ends."""
        places = self._where.get(unit)
        return places is not None and places[-1] > self.cursor

    def upcoming(self, limit: int) -> Iterator[int]:
        """The next ``limit`` units in order, the cursor's own not included."""
        for step in range(1, min(limit, len(self.order) - 1) + 1):
            yield self.order[(self.cursor + step) % len(self.order)]

    def rewind(self) -> None:
        """Puts the cursor before the first use."""
        self.cursor = -1


class Recorder:
    """Learns the order of one step and says when it differs from the last."""

    #: A loop that never steps must not grow a list without end.
    LIMIT = 1_000_000

    def __init__(self, guess: list[int]):
        self.trace = Trace(guess)
        self.forward = Trace(guess[: (len(guess) + 1) // 2])
        self.first_uses = list(dict.fromkeys(guess))  # units in the order in which a step first uses them
        self.learned = False
        self.departures = 0
        self._seen: list[int] = []
        self._last: int | None = None
        self._forward_end = 0

    def visit(self, unit: int, learning: bool) -> bool:
        """Notes one use; returns whether it is another unit's than the last. ``learning``: under grad, where a backward
        and a step may follow.
        """
        again, self._last = self._last == unit, unit
        if not learning:
            self.forward.visit(unit)
            return not again
        if self._seen and self._seen[-1] == unit:
            return False
        if not self.trace.visit(unit) and self.learned:
            self.departures += 1
        if len(self._seen) < self.LIMIT:
            self._seen.append(unit)
        return True

    def current(self, learning: bool) -> Trace:
        """The trace that predicts now: a whole step's, or a forward's over and over."""
        return self.trace if learning else self.forward

    def forward_ended(self) -> None:
        """The first forward of the step is over: what follows it is its backward."""
        if not self._forward_end:
            self._forward_end = len(self._seen)

    @property
    def uses(self) -> int:
        """How many uses of this step were seen."""
        return len(self._seen)

    def step_ended(self, uses: int | None = None) -> bool:
        """Adopts what was seen as the next step's trace; True if it differs from the one before.

        ``uses``: so many were the step's. The others are the next one's forward, which is over.
        """
        seen, later = self._seen[:uses], self._seen[len(self._seen) if uses is None else uses :]
        changed = bool(seen) and seen != self.trace.order
        if changed:
            self.trace = Trace(seen)
            self.first_uses = list(dict.fromkeys(seen))
            self.forward = Trace(seen[: self._forward_end] or seen)
        self.learned = self.learned or bool(seen)
        self._seen, self._forward_end = later, len(later)
        self.trace.rewind()
        self.forward.rewind()
        for unit in later:
            self.trace.visit(unit)
        return changed
