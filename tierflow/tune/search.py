"""Successive halving, then a walk over neighbours: pure choice, told how good each setting is by who measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tierflow.tune.knobs import Setting, Space

#: The better part of the rest goes on, and is looked at longer.
KEPT = 0.5
#: What a neighbour must be better by to become the best: less is the machine's noise.
WORTH = 1.02
#: Steps of the walk; each looks at some eight neighbours.
MOST_MOVES = 2


class Meter(Protocol):
    """Who measures. Samples of a setting add up over calls, and ``score`` is of all of them."""

    def add(self, setting: Setting) -> bool:
        """Makes it ready; False if it cannot be had."""

    def drop(self, setting: Setting) -> None:
        """It is out; what was measured of it stays."""

    def visit(self, settings: list[Setting], effort: int) -> bool:
        """One look at each, ``effort`` times as long as the shortest; False if the means do not suffice."""

    def score(self, setting: Setting) -> float:
        """The larger, the better."""


@dataclass
class Outcome:
    """``near``: (knob, setting) for the best's neighbours that were measured. ``complete``: nothing was cut short."""

    best: Setting
    near: list[tuple[str, Setting]] = field(default_factory=list)
    complete: bool = True


def search(space: Space, meter: Meter, starts: list[Setting], say: Callable[[str], None] = lambda text: None) -> Outcome:
    """The best setting that the means suffice to find. Raises ValueError where no setting could be had."""
    field_ = [setting for setting in starts if meter.add(setting)]
    if not field_:
        raise ValueError("none of the settings tried could be opened here")
    effort = 1
    while True:
        say(f"halving: {len(field_)} settings")
        # interleaved and repeated: what the machine does beside this hits all alike
        complete = all([meter.visit(field_, effort) for _ in range(2)])
        ranked = sorted(field_, key=meter.score, reverse=True)
        if len(ranked) <= 2 or not complete:
            break
        keep = max(2, int(len(ranked) * KEPT))
        for setting in ranked[keep:]:
            meter.drop(setting)
        field_, effort = ranked[:keep], effort + 1
    for setting in ranked[1:]:
        meter.drop(setting)
    return _walk(space, meter, ranked[0], effort, complete, say)


def _walk(
    space: Space, meter: Meter, best: Setting, effort: int, complete: bool, say: Callable[[str], None]
) -> Outcome:
    for move in range(MOST_MOVES + 1):
        near, looked = _look_around(space, meter, best, effort, say) if complete else ([], False)
        complete = complete and looked
        top = max((s for _, s in near), key=meter.score, default=best)
        better = meter.score(top) > meter.score(best) * WORTH and move < MOST_MOVES
        for _, setting in near:
            if not (better and setting == top):
                meter.drop(setting)
        if not better:
            return Outcome(best, near, complete)
        meter.drop(best)
        best = top
        say(f"moved to {best}")
    raise AssertionError("the last round never moves")


def _look_around(
    space: Space, meter: Meter, best: Setting, effort: int, say: Callable[[str], None]
) -> tuple[list[tuple[str, Setting]], bool]:
    """Neighbours of the best that could be had, each measured beside it; and whether the means sufficed."""
    near = [(knob, setting) for knob, setting in space.neighbours(best) if meter.add(setting)]
    say(f"neighbours: {len(near)} settings that differ from the best in one knob")
    together = [best, *(setting for _, setting in near)]
    return near, all([meter.visit(together, effort) for _ in range(2)])
