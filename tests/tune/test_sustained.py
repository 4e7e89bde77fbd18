"""Where a write cache ends: on made-up curves, and the bytes that a real run writes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierflow.tune.budget import Budget
from tierflow.tune.floor import FORMATS
from tierflow.tune.knobs import Setting
from tierflow.tune.rig import TRANSFER, Rig
from tierflow.tune.sustained import collapse, wear, write_on


def curve(fast: int, slow: int, high: float, low: float, noise: float, seed: int = 0) -> list[tuple[int, float]]:
    rng = random.Random(seed)
    rates = [high] * fast + [low] * slow
    return [((n + 1) * 10**9, rate * rng.uniform(1 - noise, 1 + noise)) for n, rate in enumerate(rates)]


@given(st.integers(20, 300), st.integers(20, 300), st.floats(0.1, 0.55), st.integers(0, 99))
def test_the_place_of_a_collapse_is_found_under_noise(fast: int, slow: int, share: float, seed: int) -> None:
    before, after, cache = collapse(curve(fast, slow, 5e9, 5e9 * share, 0.1, seed))
    assert cache is not None and abs(cache // 10**9 - fast) <= max(2, 0.05 * (fast + slow))
    assert before == pytest.approx(5e9, rel=0.1) and after == pytest.approx(5e9 * share, rel=0.1)


@given(st.integers(1, 300), st.floats(0.0, 0.12), st.integers(0, 99))
def test_a_steady_drive_has_no_collapse(steps: int, noise: float, seed: int) -> None:
    assert collapse(curve(steps, 0, 3e9, 0, noise, seed))[2] is None


def test_single_slow_moments_are_no_collapse() -> None:
    steps = curve(100, 0, 3e9, 0, 0.02)
    for n in (10, 50, 98, 99):
        steps[n] = (steps[n][0], 1e8)
    assert collapse(steps)[2] is None


def test_a_run_writes_what_was_asked_for_and_says_when_it_went_round(tmp_path: Path) -> None:
    rig = Rig([str(tmp_path)], ("write",), FORMATS["fp32"], Budget(60.0))
    setting = Setting("threads", 1 << 20, 4, 1, False)
    told: list[tuple[int, float]] = []
    found = write_on(rig, setting, 40 * TRANSFER, 16 * TRANSFER, lambda done, rate: told.append((done, rate)))
    assert rig.budget.written == 40 * TRANSFER
    assert found.rewrote and found.before > 0 and found.steps[-1][0] <= 40 * TRANSFER
    assert not write_on(rig, setting, 8 * TRANSFER, 16 * TRANSFER, lambda done, rate: None).rewrote


def test_wear_is_told_in_bytes_and_share() -> None:
    assert "200 GB" in wear(200 * 10**9) and "0.033%" in wear(200 * 10**9) and "0.0013%" in wear(8 * 10**9)
