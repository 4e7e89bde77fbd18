"""Which copies to give up so that a run of memory becomes free."""

from __future__ import annotations

from typing import NamedTuple

from tierflow.swap.types import Chunk


class Place(NamedTuple):
    """``nbytes`` of a pool at ``offset``: free, or a copy that may go. ``rank``: 0 for the farthest next use."""

    offset: int
    nbytes: int
    rank: int
    chunk: Chunk | None

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.nbytes


def cheapest(places: list[Place], nbytes: int) -> list[Chunk] | None:
    """Copies that lie side by side and whose going makes a run of ``nbytes``, the nearest use of theirs as far as can be,
    and of those the fewest bytes; None if no going makes such a run.
    """
    rows = sorted(places, key=lambda place: place.offset)
    best: list[Place] | None = None
    first = 0
    for last, place in enumerate(rows):
        if last and rows[last - 1].end != place.offset:
            first = last  # something between the two stays
        while first < last and place.end - rows[first + 1].offset >= nbytes:
            first += 1
        window = rows[first : last + 1]
        if place.end - rows[first].offset >= nbytes and (best is None or _loss(window) < _loss(best)):
            best = window
    return None if best is None else [place.chunk for place in best if place.chunk is not None]


def _loss(window: list[Place]) -> tuple[int, int]:
    """What giving up a window costs: how near its nearest use is, then bytes."""
    return max(place.rank for place in window), sum(place.nbytes for place in window if place.rank >= 0)
