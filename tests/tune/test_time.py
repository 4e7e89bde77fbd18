"""A whole run on a drive that is arithmetic, by that drive's own clock: --time bounds all of it, however slow it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from tierflow.tune import budget, load, rig, session
from tierflow.tune.budget import Budget
from tierflow.tune.floor import FORMATS
from tierflow.tune.knobs import Setting, Space
from tierflow.tune.rig import Rig
from tierflow.tune.session import FINAL_LOOKS, Finding, Watcher, find

MIB = 1 << 20
FIRST = Setting("io_uring", 2 * MIB, 16, 1, False)


@dataclass
class Drive:
    """Carries out one transfer after the other at ``rate`` bytes per second, each at least 50 microseconds long; from
    ``worn`` bytes written on, at a tenth of it."""

    rate: float
    worn: float = float("inf")
    now: float = 0.0
    free: float = 0.0
    written: int = 0

    def transfer(self, op: str, nbytes: int) -> Any:
        self.now += 5e-6  # a call is not for nothing
        self.written += nbytes if op == "write" else 0
        rate = self.rate / (10 if self.written > self.worn else 1)
        began = max(self.now, self.free)
        self.free = began + max(nbytes / rate, 5e-5)
        ended = self.free

        def wait() -> None:
            self.now = max(self.now, ended)

        return SimpleNamespace(op=op, nbytes=nbytes, began=began, ended=ended, wait=wait)


@dataclass
class Store:
    drive: Drive
    capacity: int
    taken: int = field(default=0)
    paths: tuple[Any, ...] = ()

    def allocate(self, nbytes: int) -> Any:
        self.taken += nbytes
        assert self.taken <= self.capacity
        return SimpleNamespace(offset=self.taken - nbytes)

    def read(self, piece: memoryview, offset: int) -> Any:
        return self.drive.transfer("read", len(piece))

    def write(self, piece: memoryview, offset: int) -> Any:
        return self.drive.transfer("write", len(piece))

    def close(self) -> None:
        pass

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def run(monkeypatch: pytest.MonkeyPatch, drive: Drive, seconds: float, paths: int) -> tuple[Rig, Finding]:
    clock = SimpleNamespace(monotonic=lambda: drive.now, perf_counter=lambda: drive.now)
    monkeypatch.setattr(budget, "time", clock)
    monkeypatch.setattr(load, "time", clock)
    for module in (rig, session):
        monkeypatch.setattr(module, "open_store", lambda paths, nbytes, setting, weights: Store(drive, nbytes * len(paths)))
    made = Rig([f"/{n}" for n in range(paths)], load.KINDS, FORMATS["lossless"], Budget(seconds, began=0.0))
    return made, find(made, Space(huge_pages=(False,)), FIRST, 96 * MIB, 1024 * MIB, Watcher())


@pytest.mark.parametrize("seconds", [10.0, 60.0])
@pytest.mark.parametrize(("rate", "paths"), [(2e7, 1), (1e8, 1), (1e8, 3), (1e9, 2), (6e9, 1)])
def test_seconds_bound_the_whole_run(monkeypatch: pytest.MonkeyPatch, rate: float, paths: int, seconds: float) -> None:
    drive = Drive(rate)
    made, found = run(monkeypatch, drive, seconds, paths)
    assert drive.now <= seconds * 1.02
    assert made.budget.written == drive.written < 20 * 10**9
    for figures in found.figures.values():
        assert figures.rate() == pytest.approx(rate, rel=0.05)
        assert found.complete <= (len(figures.samples) == FINAL_LOOKS)
    assert found.size <= 1024 * MIB and (found.size == 1024 * MIB or rate * seconds < 20 * 1024 * MIB * paths)
    assert found.complete or rate < 1e9 or seconds < 60


def test_a_drive_that_turns_slow_in_the_middle_does_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = Drive(2e9, worn=3e9)
    run(monkeypatch, drive, 30.0, 1)
    assert drive.now <= 30.0 * 1.05


def test_the_queue_is_as_long_as_a_slow_drive_can_empty() -> None:
    for most in (1, 2, 4, 8, 16, 32):
        space = Space(most_in_flight=most * MIB)
        for setting in (FIRST, Setting("threads", 16 * MIB, 2, 1, True), Setting("io_uring", 128 << 10, 64, 4, True)):
            assert space.within(setting).in_flight == min(setting.in_flight, most * MIB)
        assert all(s.in_flight <= most * MIB for s in space.starts(12))
