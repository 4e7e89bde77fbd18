"""Writing until a drive's cache is full: how fast it is before, after, and where the change comes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tierflow import aio
from tierflow.sizes import format_size
from tierflow.tune.knobs import Setting
from tierflow.tune.load import median
from tierflow.tune.rig import TRANSFER, Rig
from tierflow.tune.stores import lay_out, open_store

#: What endurance is told against, where nobody knows the drive's own: a usual rating of a 1 TB consumer drive.
RATED_BYTES = 600 * 10**12
#: The steps in which the rate is looked at: this many over the whole run, and none shorter than this (seconds).
STEPS, SHORTEST = 400, 0.1
#: A collapse: from some step on the rest of the run stays below this share of what was before.
COLLAPSED = 0.7
#: A change that lasts less than this share of the run is no new state.
LASTING = 0.05


@dataclass(frozen=True)
class Sustained:
    """``steps``: (bytes written so far, bytes per second since the last step). Rates in bytes per second; ``cache``:
    bytes after which the rate fell for good, None if it did not; ``rewrote``: the file was shorter than what was
    written, so places were written again."""

    steps: list[tuple[int, float]]
    before: float
    after: float
    cache: int | None
    rewrote: bool


def wear(nbytes: int) -> str:
    """What so many bytes cost, said before the first is written."""
    share = nbytes / RATED_BYTES
    return (
        f"--sustained writes {format_size(nbytes)} to find where a write cache is full: {100 * share:.2g}% of the "
        f"{format_size(RATED_BYTES)} that a 1 TB consumer drive is often rated for"
    )


def write_on(rig: Rig, setting: Setting, nbytes: int, file_bytes: int, tell: Callable[[int, float], None]) -> Sustained:
    """Writes ``nbytes`` in order into files of ``file_bytes`` on each path, again from the start where they end."""
    transfer = max(TRANSFER, setting.block_size)
    with open_store(rig.paths, file_bytes, setting, rig.weights) as store:
        pieces = rig.pieces(setting, transfer)
        offsets = lay_out(store, transfer)
        steps = _write(rig, store, offsets, pieces, nbytes, tell)
    before, after, cache = collapse(steps)
    return Sustained(steps, before, after, cache, nbytes // transfer > len(offsets))


def _write(
    rig: Rig, store: aio.Store, offsets: list[int], pieces: list[memoryview], nbytes: int, tell: Callable[[int, float], None]
) -> list[tuple[int, float]]:  # fmt: skip
    transfer = len(pieces[0])
    under_way: deque[aio.Ticket] = deque()
    steps: list[tuple[int, float]] = []
    least, mark, last, done = nbytes // STEPS, time.perf_counter(), 0, 0
    try:
        for number in range(max(1, nbytes // transfer)):
            if len(under_way) == len(pieces):
                under_way.popleft().wait()
                done += transfer
            under_way.append(store.write(pieces[number % len(pieces)], offsets[number % len(offsets)]))
            rig.budget.written += transfer
            now = time.perf_counter()
            if done - last >= least and now - mark >= SHORTEST:
                steps.append((done, (done - last) / (now - mark)))
                tell(*steps[-1])
                mark, last = now, done
    finally:
        _drain(under_way)
    for ticket in under_way:
        ticket.wait()
    if not steps:  # too short for a step
        done += len(under_way) * transfer
        steps.append((done, done / max(time.perf_counter() - mark, 1e-9)))
    return steps


def _drain(under_way: deque[aio.Ticket]) -> None:
    """Waits without raising: the buffers are somebody's again only then."""
    for ticket in under_way:
        try:
            ticket.wait()
        except aio.AioError:
            continue


def collapse(steps: list[tuple[int, float]]) -> tuple[float, float, int | None]:
    """(rate before, rate after, bytes until then): the split that parts the steps best, if what follows is a collapse.

    Both rates are medians, so that one slow moment (a flush, another program) is no collapse.
    """
    rates = [rate for _, rate in steps]
    least = max(2, int(len(rates) * LASTING))
    whole = median(rates)
    if len(rates) < 2 * least:
        return whole, whole, None
    splits = range(least, len(rates) - least + 1)
    best = min(splits, key=lambda at: _scatter(rates[:at]) + _scatter(rates[at:]))
    before, after = median(rates[:best]), median(rates[best:])
    if after >= COLLAPSED * before:
        return whole, whole, None
    return before, after, steps[best - 1][0]


def _scatter(rates: list[float]) -> float:
    middle = median(rates)
    return sum(abs(rate - middle) for rate in rates)
