"""Sums of a timeline against ones that count ticks of a clock one by one."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierflow.swap import Lane, Timeline
from tierflow.swap import timeline as module
from tierflow.swap.timeline import length, union, without

ticks = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda p: (min(p), max(p)))
many = st.lists(ticks, max_size=12)


def covered(intervals: list[tuple[int, int]]) -> set[int]:
    return {t for begin, end in intervals for t in range(begin, end)}


@given(many, many)
def test_union_and_difference_hold_the_very_ticks(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    assert length(union(a)) == len(covered(a))
    rest = without(union(a), union(b))
    assert covered(rest) == covered(a) - covered(b)  # type: ignore[arg-type]
    assert all(x[1] <= y[0] for x, y in itertools.pairwise(rest)) and all(x < y for x, y in rest)
    assert all(x[1] < y[0] for x, y in itertools.pairwise(union(a)))


class Clock:
    """Stands in for ``time``: the tick that a test says it is."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@dataclass
class Work:
    began: float | None = None
    ended: float | None = None


def test_two_reads_at_once_count_once_and_their_bytes_twice(clock: Clock) -> None:
    timeline = Timeline()
    for began, ended, nbytes in ((1.0, 4.0, 100), (2.0, 6.0, 30), (8.0, 9.0, 7)):
        timeline.follow(Lane.READ, "a", Work(began, ended), nbytes)
    clock.now = 10.0
    lanes = timeline.take()
    assert (lanes.seconds, lanes.busy[Lane.READ], lanes.nbytes[Lane.READ]) == (10.0, 6.0, 137)
    assert lanes.waited == 0 and all(lanes.busy[lane] == 0 for lane in Lane if lane is not Lane.READ)


def test_work_across_the_end_of_a_step_counts_in_both_and_its_bytes_in_the_second(clock: Clock) -> None:
    timeline, work = Timeline(), Work()
    timeline.follow(Lane.WRITE, "a", work, 64)
    clock.now = 2.0
    queued = timeline.take()
    work.began = 3.0
    clock.now = 5.0
    first = timeline.take()
    work.ended = 6.0
    clock.now = 9.0
    second, third = timeline.take(), timeline.take()
    assert [x.busy[Lane.WRITE] for x in (queued, first, second, third)] == [0, 2, 1, 0]
    assert [x.nbytes[Lane.WRITE] for x in (queued, first, second, third)] == [0, 0, 64, 0]


def test_compute_leaves_out_what_its_own_thread_did_besides_and_nothing_of_others(clock: Clock) -> None:
    timeline = Timeline()
    timeline.span(Lane.COMPUTE, "forward", 0.0, 10.0)
    timeline.span(Lane.COMPUTE, "layer", 1.0, 9.0)
    timeline.wait(Lane.READ, "layer", 2.0, 4.0)
    timeline.span(Lane.INTAKE, "layer", 3.5, 5.0)
    timeline.follow(Lane.READ, "layer", Work(0.0, 10.0), 5)  # runs by itself
    other = threading.Thread(target=lambda: timeline.span(Lane.UPDATE, "adam", 6.0, 8.0))
    other.start()
    other.join()
    clock.now = 12.0
    lanes = timeline.take()
    assert lanes.busy[Lane.COMPUTE] == 7.0 and lanes.busy[Lane.UPDATE] == 2.0 and lanes.busy[Lane.INTAKE] == 1.5
    assert lanes.waiting[Lane.READ] == lanes.waited == 2.0
    assert lanes.noted == 10.0  # the read runs by itself, and nobody did anything after 10


def test_waits_for_two_lanes_at_once_are_not_added_up(clock: Clock) -> None:
    timeline = Timeline()
    timeline.wait(Lane.READ, "a", 1.0, 3.0)
    timeline.wait(Lane.WRITE, "b", 2.0, 4.0)
    clock.now = 5.0
    lanes = timeline.take()
    assert (lanes.waiting[Lane.READ], lanes.waiting[Lane.WRITE], lanes.waited) == (2.0, 2.0, 3.0)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=40), st.integers(1, 9))
def test_a_timeline_that_nobody_takes_has_bounded_memory_and_the_same_sums(
    steps: list[tuple[int, int]], limit: int
) -> None:
    """Spans one after the other on one lane, so that folding early changes nothing."""
    clock, real, most = Clock(), module.time, module.EVENTS
    module.time, module.EVENTS = clock, limit  # type: ignore[assignment]
    try:
        timeline, total = Timeline(), 0
        for gap, work in steps:
            begin = clock.now + gap
            clock.now = begin + work
            timeline.span(Lane.UPDATE, "a", begin, nbytes=work)
            total += work
            assert len(timeline._events) <= limit
        lanes = timeline.take()
    finally:
        module.time, module.EVENTS = real, most
    assert lanes.busy[Lane.UPDATE] == lanes.nbytes[Lane.UPDATE] == total and lanes.seconds == clock.now


def test_a_recording_has_every_span_in_order_and_says_what_it_dropped(clock: Clock, monkeypatch) -> None:
    timeline, work = Timeline(), Work(2.0)
    timeline.span(Lane.COMPUTE, "before", 0.0, 1.0)
    timeline.record()
    timeline.follow(Lane.READ, "late", work, 9)
    timeline.span(Lane.COMPUTE, "inner", 4.0, 5.0)
    timeline.span(Lane.COMPUTE, "outer", 3.0, 6.0)
    timeline.take()
    work.ended = 8.0
    spans = timeline.recorded()
    assert [(s.name, s.begin, s.end, s.nbytes) for s in spans] == [
        ("late", 2.0, 8.0, 9), ("outer", 3.0, 6.0, 0), ("inner", 4.0, 5.0, 0)
    ]  # fmt: skip
    assert timeline.dropped == 0
    monkeypatch.setattr(module, "SPANS", 3)
    timeline.record()
    for i in range(5):
        timeline.span(Lane.UPDATE, str(i), i, i + 1)
    assert [s.name for s in timeline.recorded()] == ["0", "1", "2"] and timeline.dropped == 2
