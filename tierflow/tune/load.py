"""One load on an open store: transfers under way all the time, and what came of it."""

from __future__ import annotations

import resource
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

from tierflow import aio

Kind = Literal["read", "write", "mixed"]
KINDS: tuple[Kind, ...] = ("read", "write", "mixed")


@dataclass(frozen=True)
class Limits:
    """When a load ends: after ``seconds``, or once ``written`` bytes were written, whichever comes first."""

    seconds: float
    written: int = 1 << 62


@dataclass(frozen=True)
class Sample:
    """What one run of a load gave. Rates in bytes per second.

    ``cpu``: seconds of the process, the kernel's part of them in ``kernel``. ``latencies``: seconds from the request
    to its end, one for each transfer, in no order.
    """

    read: float
    write: float
    nbytes: int
    written: int
    seconds: float
    cpu: float
    kernel: float
    latencies: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Bytes per second, both directions."""
        return self.read + self.write

    @property
    def cpu_per_gib(self) -> float:
        """CPU seconds for each GiB moved."""
        return self.cpu / self.nbytes * (1 << 30)


def run(
    kind: Kind, store: aio.Store, offsets: list[int], pieces: list[memoryview], limits: Limits, share: tuple[int, int] = (1, 1)
) -> Sample:  # fmt: skip
    """Keeps one transfer under way in each of ``pieces`` until a limit is reached.

    A mixed load reads at the first half of the ``offsets`` and writes at the second, ``share[0]`` reads to
    ``share[1]`` writes. Raises aio.AioError when a transfer failed; none is under way any more then.
    """
    wanted = _wanted(kind, offsets, share)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    done = _transfer(store, wanted, pieces, began, limits)
    ended, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    kernel = after.ru_stime - before.ru_stime
    read, write = _rates(done)
    return Sample(
        read, write, sum(t.nbytes for t in done), sum(t.nbytes for t in done if t.op == "write"), ended - began,
        after.ru_utime - before.ru_utime + kernel, kernel, tuple(_took(t) for t in done),
    )  # fmt: skip


def fill(store: aio.Store, offsets: list[int], pieces: list[memoryview], seconds: float = float("inf")) -> list[int]:
    """Writes at each offset once and returns those reached: reading what was never written would not reach the drive.

    ``seconds`` end it early, but not before there is a place for each of ``pieces``.
    """
    began = time.perf_counter()
    done = _transfer(store, (("write", offset) for offset in offsets), pieces, began, Limits(seconds))
    return offsets[: len(done)]


def _wanted(kind: Kind, offsets: list[int], share: tuple[int, int]) -> Iterator[tuple[str, int]]:
    if kind != "mixed":
        return ((kind, offset) for offset in cycle(offsets))
    half = len(offsets) // 2
    return _alternate(cycle(offsets[:half] or offsets), cycle(offsets[half:]), *share)


def _alternate(reads: Iterator[int], writes: Iterator[int], r: int, w: int) -> Iterator[tuple[str, int]]:
    """Spread evenly: 3 to 1 is r r w r, and not three reads and then a write."""
    turn = 0
    while True:
        turn += w
        if turn >= r + w:
            turn -= r + w
            yield "write", next(writes)
        else:
            yield "read", next(reads)


def _transfer(
    store: aio.Store, wanted: Iterator[tuple[str, int]], pieces: list[memoryview], began: float, limits: Limits
) -> list[aio.Ticket]:
    """The tickets, all over."""
    under_way: deque[aio.Ticket] = deque()
    ended: list[aio.Ticket] = []
    written = 0
    try:
        for number, (op, offset) in enumerate(wanted):
            enough = time.perf_counter() - began > limits.seconds or written >= limits.written
            if enough and number >= least_transfers(len(pieces)):
                break
            if len(under_way) == len(pieces):
                ended.append(under_way.popleft())
                ended[-1].wait()
            start = store.read if op == "read" else store.write
            under_way.append(start(pieces[number % len(pieces)], offset))
            written += under_way[-1].nbytes if op == "write" else 0
    finally:
        failed = _settle(under_way)
    if failed is not None:
        raise failed
    return ended + list(under_way)


def least_transfers(pieces: int) -> int:
    """What a load moves however short its limits: with less there would be no full queue to speak of."""
    return pieces * 3 // 2


def _settle(under_way: deque[aio.Ticket]) -> aio.AioError | None:
    """Waits for all of them whatever happens: their buffers are about to be used again."""
    failed = None
    for ticket in under_way:
        try:
            ticket.wait()
        except aio.AioError as error:
            failed = failed or error
    return failed


def _took(ticket: aio.Ticket) -> float:
    assert ticket.began is not None and ticket.ended is not None
    return ticket.ended - ticket.began


def _rates(tickets: list[aio.Ticket]) -> tuple[float, float]:
    """(read, write) from the first request to the last end. The queue fills and empties in that time, with the drive
    busy meanwhile: it costs about one request's latency, and any cut inside the run costs more in noise."""
    begin = min(t.began for t in tickets if t.began is not None)
    seconds = max(max(t.ended for t in tickets if t.ended is not None) - begin, 1e-9)
    read = sum(t.nbytes for t in tickets if t.op == "read") / seconds
    return read, sum(t.nbytes for t in tickets if t.op == "write") / seconds


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of them lie (nearest rank). ``values`` must not be empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def median(values: list[float]) -> float:
    """Of at least one."""
    return statistics.median(values)
