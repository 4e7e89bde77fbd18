"""How far ahead units are brought up, against a simulation of one link that carries them in order of use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tierflow.scheduler.lookahead import leads

TIMES = st.integers(0, 20)


def waits(seconds: list[float], transfers: list[float], starts: list[int], rounds: int = 6) -> list[float]:
    """How long each use of the last round waits if its transfer starts when use ``starts[i]`` before it begins."""
    count, now, link = len(seconds), 0.0, 0.0
    began: list[float] = []
    arrived: dict[int, float] = {}
    asked = 0
    found = []
    for at in range(rounds * count):
        while asked < rounds * count and asked - starts[asked % count] <= at:
            link = max(link, now) + transfers[asked % count] if transfers[asked % count] else link
            arrived[asked] = link if transfers[asked % count] else 0.0
            asked += 1
        if at >= (rounds - 1) * count:
            found.append(max(arrived[at] - now, 0.0))
        now = max(now, arrived[at])
        began.append(now)
        now += seconds[at % count]
    return found


def test_one_large_unit_starts_as_many_uses_before_as_its_transfer_takes() -> None:
    assert leads([1.0] * 8, [0.0] * 5 + [3.5] + [0.0] * 2) == [0, 0, 1, 2, 3, 4, 0, 0]


def test_a_slow_link_leads_as_far_back_as_a_round() -> None:
    assert min(leads([1.0] * 6, [2.0] * 6)) == 5


def test_what_is_there_for_good_is_not_brought_up() -> None:
    assert leads([1.0] * 4, [0.0] * 4) == [0, 0, 0, 0]


@given(st.lists(st.tuples(TIMES, TIMES), min_size=2, max_size=12))
def test_nobody_waits_where_the_link_is_fast_enough(times: list[tuple[int, int]]) -> None:
    seconds, transfers = [float(a + 1) for a, _ in times], [float(b) for _, b in times]
    found = leads(seconds, transfers)
    assert all(0 <= n < max(len(times), 1) for n in found)
    if 2 * sum(transfers) <= sum(seconds) - max(seconds):
        assert not any(waits(seconds, transfers, found))


@given(st.lists(st.tuples(TIMES, TIMES), min_size=2, max_size=12))
def test_each_starts_as_late_as_it_and_those_behind_it_allow(times: list[tuple[int, int]]) -> None:
    count = len(times)
    seconds, transfers = [float(a + 1) for a, _ in times], [float(b) for _, b in times]
    if sum(transfers) > sum(seconds):
        return
    for at, ahead in enumerate(leads(seconds, transfers)):
        until = [sum(seconds[(at + j) % count] for j in range(i)) for i in range(count)]  # from the use to the i-th behind it
        carried = [sum(transfers[(at + j) % count] for j in range(i + 1)) for i in range(count)]
        early = max(c - u for c, u in zip(carried, until, strict=True))  # before its use
        passed = [sum(seconds[(at - j) % count] for j in range(1, k + 1)) for k in range(count)]
        assert ahead == next((k for k, time in enumerate(passed) if time >= early), count - 1)
