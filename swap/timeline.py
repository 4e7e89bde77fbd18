"""When each lane was busy, what it moved, and how long somebody waited for it.

An event costs one append; sums are made once, at ``take``. Times are seconds of ``time.perf_counter()``.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import get_ident
from typing import NamedTuple, Protocol

#: Events kept between two calls of ``take``, and spans kept by a recording. A step has some thousands.
EVENTS = 1 << 16
SPANS = 1 << 18

Interval = tuple[float, float]


class Lane(enum.Enum):
    """What can be busy: forward and backward, the kernels that take gradients in and update, and four links."""

    COMPUTE = "compute"
    INTAKE = "gradient intake"
    UPDATE = "update kernel"
    READ = "NVMe read"
    WRITE = "NVMe write"
    TO_DEVICE = "host to device"
    TO_HOST = "device to host"


class Timed(Protocol):
    """Something asynchronous that knows its own times, each None before the event."""

    @property
    def began(self) -> float | None:
        """When the work began."""
        ...

    @property
    def ended(self) -> float | None:
        """When the work ended."""
        ...


class Inline:
    """What the calling thread itself did from ``began`` until this was made."""

    def __init__(self, began: float):
        self._began, self._ended = began, time.perf_counter()

    @property
    def began(self) -> float | None:
        """When the work began."""
        return self._began

    @property
    def ended(self) -> float | None:
        """When it ended."""
        return self._ended


class Span(NamedTuple):
    """One stretch of a lane's work, or (``wait``) of waiting for the lane.

    ``thread``: the one that was occupied; 0 for work that ran by itself, and for the compute stream's waits.
    """

    lane: Lane
    name: str
    begin: float
    end: float
    nbytes: int = 0
    wait: bool = False
    thread: int = 0


@dataclass(frozen=True)
class Lanes:
    """What the lanes did in ``seconds`` of wall time.

    ``busy``: seconds with at least one span of the lane; COMPUTE without what its thread waited, copied or spent in
    kernels meanwhile. ``nbytes``: of spans that ended. ``waiting``: seconds that a thread waited for the lane.
    ``waited``: seconds of any waiting. ``noted``: seconds in which some thread was in a span or waited. ``computed``: seconds
    of COMPUTE spans by name.
    """

    seconds: float
    busy: dict[Lane, float]
    nbytes: dict[Lane, int]
    waiting: dict[Lane, float]
    waited: float
    noted: float
    computed: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: Lanes) -> Lanes:
        return Lanes(
            self.seconds + other.seconds,
            {lane: self.busy[lane] + other.busy[lane] for lane in Lane},
            {lane: self.nbytes[lane] + other.nbytes[lane] for lane in Lane},
            {lane: self.waiting[lane] + other.waiting[lane] for lane in Lane},
            self.waited + other.waited,
            self.noted + other.noted,
            {n: self.computed.get(n, 0.0) + other.computed.get(n, 0.0) for n in self.computed | other.computed},
        )

    def __truediv__(self, count: int) -> Lanes:
        return Lanes(
            self.seconds / count,
            {lane: s / count for lane, s in self.busy.items()},
            {lane: n // count for lane, n in self.nbytes.items()},
            {lane: s / count for lane, s in self.waiting.items()},
            self.waited / count,
            self.noted / count,
            {name: s / count for name, s in self.computed.items()},
        )


class Timeline:
    """Collects spans and waits. Any thread may add; one thread takes.

    ``names``: by id of chunk, what its spans are called.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        #: Spans that a recording had no room for.
        self.dropped = 0
        self._events: list[Span] = []
        self._under_way: list[tuple[Lane, str, Timed, int, bool]] = []
        self._since = time.perf_counter()
        self._folded = _no_lanes()
        self._kept: list[Span] | None = None

    def name(self, chunk_id: int) -> str:
        """What spans of the chunk are called."""
        return self.names.get(chunk_id, f"chunk {chunk_id}")

    def span(self, lane: Lane, name: str, begin: float, end: float | None = None, nbytes: int = 0) -> None:
        """The calling thread did the lane's work from ``begin`` to ``end`` (now)."""
        self._add(Span(lane, name, begin, time.perf_counter() if end is None else end, nbytes, False, get_ident()))

    def wait(self, lane: Lane, name: str, begin: float, end: float | None = None) -> None:
        """The calling thread waited for the lane from ``begin`` to ``end`` (now)."""
        self._add(Span(lane, name, begin, time.perf_counter() if end is None else end, 0, True, get_ident()))

    def follow(self, lane: Lane, name: str, work: Timed, nbytes: int = 0, wait: bool = False) -> None:
        """Notes ``work`` with its own times once it has ended. Call this as it starts, on the thread that started it.

        Held until then: give a transfer's ``ticket.times``, which holds none of its memory.
        """
        if isinstance(work, Inline):
            self._add(Span(lane, name, work.began or 0.0, work.ended or 0.0, nbytes, wait, get_ident()))
            return
        self._under_way.append((lane, name, work, nbytes, wait))
        if len(self._under_way) > EVENTS:
            self._fold()

    def _add(self, span: Span) -> None:
        self._events.append(span)
        if len(self._events) > EVENTS:
            self._fold()

    def take(self) -> Lanes:
        """What happened since the last call. Work under way counts for as long as it has run; its bytes when it ends."""
        self._fold()
        lanes, self._folded = self._folded, _no_lanes()
        return lanes

    def _fold(self) -> None:
        now, events = time.perf_counter(), self._events
        self._events = []
        open_spans = self._end_followed(events, now)
        if self._kept is not None:
            self.dropped += max(len(self._kept) + len(events) - SPANS, 0)
            self._kept += events[: SPANS - len(self._kept)]
        self._folded += _sums(events, open_spans, (self._since, now))
        self._since = now

    def _end_followed(self, events: list[Span], now: float) -> list[Span]:
        """Appends what has ended to ``events``; returns what has begun."""
        following, self._under_way = self._under_way, []
        open_spans = []
        for entry in following:
            lane, name, work, nbytes, wait = entry
            end, begin = work.ended, work.began
            if begin is not None and end is not None:
                events.append(Span(lane, name, begin, end, nbytes, wait))
                continue
            self._under_way.append(entry)
            if begin is not None:
                open_spans.append(Span(lane, name, begin, now, 0, wait))
        return open_spans

    def record(self) -> None:
        """Keeps spans from here on until ``recorded``, SPANS of them at most."""
        self._fold()
        self._kept, self.dropped = [], 0

    def recorded(self) -> list[Span]:
        """The spans that ended since ``record``, in order of their beginning; ends the recording."""
        self._fold()
        kept, self._kept = self._kept or [], None
        return sorted(kept, key=lambda s: (s.begin, -s.end))


def _no_lanes() -> Lanes:
    return Lanes(0.0, dict.fromkeys(Lane, 0.0), dict.fromkeys(Lane, 0), dict.fromkeys(Lane, 0.0), 0.0, 0.0)


def _sums(ended: list[Span], open_spans: list[Span], window: Interval) -> Lanes:
    worked: dict[Lane, list[Interval]] = {lane: [] for lane in Lane}
    waited: dict[Lane, list[Interval]] = {lane: [] for lane in Lane}
    nbytes = dict.fromkeys(Lane, 0)
    occupied: dict[int, list[Interval]] = {}
    computed: dict[int, list[Interval]] = {}
    by_name: dict[str, float] = {}
    for s in (*ended, *open_spans):
        interval = max(s.begin, window[0]), min(s.end, window[1])
        nbytes[s.lane] += s.nbytes
        if s.lane is Lane.COMPUTE and not s.wait:
            computed.setdefault(s.thread, []).append(interval)
            by_name[s.name] = by_name.get(s.name, 0.0) + max(interval[1] - interval[0], 0.0)
            continue
        if s.lane is not Lane.COMPUTE:  # who waits for the processor waits while it works
            (waited if s.wait else worked)[s.lane].append(interval)
        if s.thread or s.wait:
            occupied.setdefault(s.thread, []).append(interval)
    for thread, own in computed.items():
        worked[Lane.COMPUTE] += without(union(own), union(occupied.get(thread, [])))
    busy = {lane: length(union(worked[lane])) for lane in Lane}
    waiting = {lane: length(union(waited[lane])) for lane in Lane}
    every = length(union([i for intervals in waited.values() for i in intervals]))
    by_threads = [*occupied.items(), *computed.items()]
    noted = length(union([i for thread, intervals in by_threads if thread for i in intervals]))
    return Lanes(window[1] - window[0], busy, nbytes, waiting, every, noted, by_name)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order; empty ones are left out."""
    out: list[Interval] = []
    for begin, end in sorted(intervals):
        if end <= begin:
            continue
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((begin, end))
    return out


def without(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """The points of ``a`` that are not in ``b``; both disjoint and in order."""
    out: list[Interval] = []
    at = 0
    for begin, end in a:
        while at < len(b) and b[at][1] <= begin:
            at += 1
        here = at
        while here < len(b) and b[here][0] < end:
            if begin < b[here][0]:
                out.append((begin, b[here][0]))
            begin = max(begin, b[here][1])
            here += 1
        if begin < end:
            out.append((begin, end))
    return out


def length(intervals: Iterable[Interval]) -> float:
    """Seconds in disjoint intervals."""
    return sum(end - begin for begin, end in intervals)
