"""The floor of a step in closed form."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierflow.scheduler.floor import Work, drive_seconds, floor
from tierflow.scheduler.rates import Bandwidths

#: Round rates: bytes (elements) per second.
RATES = Bandwidths(
    read=100, write=50, mixed_read=40, mixed_write=40, to_device=1000, to_host=500, update=10, intake=200
)
WORK = Work(compute=3.0, updated=20, intake=100, read=1000, written=100, to_device=4000, to_host=500)


def test_without_an_accelerator_everything_but_the_drive_adds_up() -> None:
    found = floor(WORK, RATES, accelerator=False)
    # compute 3, update 20/10, intake 100/200, copies 4000/1000 and 500/500
    assert found.resources["processor"] == 3.0 + 2.0 + 0.5 + 4.0 + 1.0
    # both kinds for 100/40 s, in which 100 of the 1000 bytes are read too; the other 900 at 100 a second
    assert found.resources["drive"] == 2.5 + 9.0
    assert (found.bound, found.seconds, found.second) == ("drive", 11.5, 10.5)


@pytest.mark.parametrize("on_device", [False, True])
def test_with_an_accelerator_each_resource_is_its_own(on_device: bool) -> None:
    found = floor(WORK, RATES, accelerator=True, update_on_device=on_device)
    assert found.resources == {
        "accelerator": 3.0 + (2.0 if on_device else 0.0),
        "processor": 0.5 + (0.0 if on_device else 2.0),
        "drive": 11.5,
        "host to device": 4.0,
        "device to host": 1.0,
    }


@pytest.mark.parametrize(
    ("read", "written", "seconds"),
    [
        (0, 0, 0.0),
        (300, 0, 3.0),
        (0, 300, 6.0),
        (400, 400, 10.0),  # both end together at 40 a second; one after the other would be 4 + 8
        (400, 40, 1.0 + 3.6),  # one second of both, the rest of the reads alone; 4.8 apart
        (40, 400, 1.0 + 7.2),
    ],
)
def test_a_drives_time_by_mix(read: int, written: int, seconds: float) -> None:
    assert drive_seconds(read, written, RATES) == pytest.approx(seconds, rel=1e-12)


def test_a_drive_that_is_worse_at_both_does_one_after_the_other() -> None:
    rates = Bandwidths(read=100, write=50, mixed_read=10, mixed_write=10)
    assert drive_seconds(400, 400, rates) == 4.0 + 8.0


def test_paths_that_are_not_in_use_take_no_time() -> None:
    found = floor(Work(compute=2.0), Bandwidths(), accelerator=True)
    assert (found.bound, found.seconds, found.second) == ("accelerator", 2.0, 0.0)


amount = st.integers(0, 10**12)
rate = st.floats(1e6, 1e11)


@given(amount, amount, rate, rate, st.floats(0.2, 1.0), st.floats(0.2, 1.0))
def test_the_drives_time_lies_between_its_bounds(
    read: int, written: int, r: float, w: float, slow_read: float, slow_write: float
) -> None:
    """Never below the longer kind alone, never above one after the other, and more bytes never take less."""
    rates = Bandwidths(read=r, write=w, mixed_read=r * slow_read, mixed_write=w * slow_write)
    seconds = drive_seconds(read, written, rates)
    slack = 1 + 1e-9
    assert max(read / r, written / w) <= seconds * slack
    assert seconds <= (read / r + written / w) * slack
    assert drive_seconds(2 * read, 2 * written, rates) == pytest.approx(2 * seconds)
    assert math.isfinite(seconds)
