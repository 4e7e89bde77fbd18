"""The search on landscapes whose best is known, and the settings it chooses from."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierflow.tune.knobs import KNOBS, Setting, Space
from tierflow.tune.search import search

SPACE = Space(rings=(1, 2, 4))
ALL = [
    s for e in SPACE.engine for b in SPACE.block_size for d in SPACE.queue_depth for r in SPACE.rings
    for h in SPACE.huge_pages if SPACE.allows(s := Setting(e, b, d, r, h))
]  # fmt: skip


class Landscape:
    """Falls off from one best setting; ``noise`` is that of a look, and looks average. Knows what is open."""

    def __init__(self, best: Setting, noise: float = 0.0, looks: int = 10**9, refused: object = None):
        self.best, self.noise, self.left, self.refused = best, noise, looks, refused
        self.rng, self.open, self.seen = random.Random(1), set(), Counter[Setting]()
        self.sums: dict[Setting, float] = {}

    def true(self, s: Setting) -> float:
        bytes_off = abs(math.log2(s.block_size / self.best.block_size)) + abs(math.log2(s.queue_depth / self.best.queue_depth))
        others = sum(getattr(s, k) != getattr(self.best, k) for k in ("engine", "rings", "huge_pages"))
        return 10.0 * 0.88**bytes_off * 0.7**others

    def add(self, s: Setting) -> bool:
        if s.engine == self.refused:
            return False
        self.open.add(s)
        return True

    def drop(self, s: Setting) -> None:
        self.open.discard(s)

    def visit(self, these: list[Setting], effort: int) -> bool:
        for s in these:
            assert s in self.open
            if self.left <= 0:
                return False
            self.left -= 1
            self.seen[s] += 1
            self.sums[s] = self.sums.get(s, 0.0) + self.true(s) * self.rng.uniform(1 - self.noise, 1 + self.noise)
        return True

    def score(self, s: Setting) -> float:
        return self.sums[s] / self.seen[s] if self.seen[s] else -1.0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL), st.integers(0, 20))
def test_it_comes_near_the_best_with_far_fewer_looks_than_a_grid(best: Setting, seed: int) -> None:
    land = Landscape(best)
    found = search(SPACE, land, SPACE.starts(12, seed))
    assert found.complete
    # the walk is short on purpose: near the top, if not at it (at it in more than half of the cases)
    assert sum(land.true(s) > land.true(found.best) for s in ALL) <= len(ALL) / 5
    assert land.true(found.best) >= max(land.true(s) for s in SPACE.starts(12, seed))
    assert len(land.seen) < len(ALL) / 5
    assert land.open == {found.best}


def test_a_single_outlier_does_not_win() -> None:
    land = Landscape(Setting("io_uring", 2 << 20, 8, 1, True), noise=0.15)
    found = search(SPACE, land, [land.best, *SPACE.starts(11)])
    assert land.true(found.best) >= 0.75 * land.true(land.best)
    assert land.seen[found.best] >= 4


def test_neighbours_that_were_measured_tell_each_knobs_effect() -> None:
    best = Setting("io_uring", 2 << 20, 8, 1, True)
    land = Landscape(best)
    found = search(SPACE, land, [best])
    assert found.best == best
    assert {knob for knob, _ in found.near} == set(KNOBS)
    assert all(land.seen[s] for _, s in found.near)


@pytest.mark.parametrize("looks", [0, 1, 13, 30])
def test_when_the_means_run_out_the_best_so_far_is_given_and_said_to_be_incomplete(looks: int) -> None:
    land = Landscape(Setting("threads", 1 << 20, 4, 1, False), looks=looks)
    found = search(SPACE, land, SPACE.starts(12))
    assert not found.complete
    assert land.score(found.best) == max(land.score(s) for s in SPACE.starts(12))


def test_settings_that_are_refused_are_passed_over() -> None:
    land = Landscape(Setting("io_uring", 2 << 20, 8, 1, True), refused="io_uring")
    assert search(SPACE, land, SPACE.starts(12)).best.engine == "threads"
    with pytest.raises(ValueError, match="none of the settings"):
        search(SPACE, land, [land.best])


@given(st.integers(1, 40), st.integers(0, 5))
def test_starts_are_distinct_inside_and_spread(count: int, seed: int) -> None:
    found = SPACE.starts(count, seed)
    assert len(set(found)) == len(found) == count
    assert all(SPACE.allows(s) for s in found)
    if count >= 12:
        assert {s.huge_pages for s in found} == {True, False} and {s.engine for s in found} == {"io_uring", "threads"}
        assert len({s.block_size for s in found}) >= 4


def test_a_space_smaller_than_asked_for_gives_what_it_has() -> None:
    tiny = Space(("threads",), (1 << 20,), (4, 8), (1,), (False,))
    assert len(tiny.starts(12)) == 2


@given(st.sampled_from(ALL))
def test_neighbours_differ_in_one_knob_by_one_place(setting: Setting) -> None:
    for knob, near in SPACE.neighbours(setting):
        assert SPACE.allows(near)
        assert [k for k in KNOBS if getattr(near, k) != getattr(setting, k)] == [knob]
        values = getattr(SPACE, knob)
        assert abs(values.index(getattr(near, knob)) - values.index(getattr(setting, knob))) == 1
