"""The trace of a few steps as a file that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from tierflow.config import ConfigError
from tierflow.scheduler.engine import Engine
from tierflow.swap import Lane, Span, Tier

log = logging.getLogger("tierflow")

#: The steps that a trace holds, counted from 1: the first one learns the order of use and is not typical.
FIRST_STEP, LAST_STEP = 2, 4
#: Shorter waits are those for something that was there already. Seconds.
SHORTEST_WAIT = 5e-6
_STEPS, _WAITS = "steps", "waits"

#: Seconds of ``time.perf_counter()``, and bytes held by tier.
Sample = tuple[float, dict[str, int]]
#: A row's name, the event's name, its beginning and end, and what is shown when it is chosen.
Entry = tuple[str, str, float, float, dict[str, Any]]


def events(spans: list[Span], steps: list[tuple[str, float, float]], samples: list[Sample]) -> list[dict[str, Any]]:
    """Chrome's trace events: a row for each lane, more where its transfers overlap, and a counter of what is held.

    On every row an event lies inside the one that it overlaps, or after it. Times are microseconds from the first.
    """
    entries: list[Entry] = [(_STEPS, name, begin, end, {}) for name, begin, end in steps]
    for s in spans:
        shown = {"bytes": s.nbytes} if s.nbytes else {}
        if not s.wait:
            entries.append((s.lane.value, s.name, s.begin, s.end, shown))
        elif s.end - s.begin >= SHORTEST_WAIT:
            entries.append((_WAITS, f"wait for {s.lane.value}: {s.name}", s.begin, s.end, {"lane": s.lane.value}))
    origin = min([e[2] for e in entries] + [at for at, _ in samples], default=0.0)
    out: list[dict[str, Any]] = [_label("process_name", 0, name="tierflow")]
    rows: dict[str, list[list[int]]] = {}
    for row, name, begin, end, shown in sorted(entries, key=lambda e: (e[2], -e[3])):
        low, high = (round((t - origin) * 1e9) for t in (begin, end))
        found = rows.setdefault(row, [])
        number = _place(found, low, high, nested=row == Lane.COMPUTE.value)
        out.append(
            {"ph": "X", "pid": 1, "tid": _tid(row, number), "name": name, "cat": row, "ts": low / 1e3, "dur": (high - low) / 1e3}
            | ({"args": shown} if shown else {})
        )
    for row, found in rows.items():
        for number in range(len(found)):
            name, tid = row if number == 0 else f"{row} {number + 1}", _tid(row, number)
            out += [_label("thread_name", tid, name=name), _label("thread_sort_index", tid, sort_index=tid)]
    for at, held in samples:
        out.append({"ph": "C", "pid": 1, "tid": 0, "name": "bytes held", "ts": round((at - origin) * 1e9) / 1e3, "args": held})
    return out


def _place(rows: list[list[int]], begin: int, end: int, nested: bool) -> int:
    """The first row on which [begin, end) fits; ``rows`` holds the ends of what is open on each, outermost first."""
    for number, ends in enumerate(rows):
        while ends and ends[-1] <= begin:
            ends.pop()
        if not ends or (nested and end <= ends[-1]):
            ends.append(end)
            return number
    rows.append([end])
    return len(rows) - 1


_ORDER = [_STEPS, Lane.COMPUTE.value, Lane.INTAKE.value, Lane.UPDATE.value, _WAITS]
_ORDER += [lane.value for lane in (Lane.READ, Lane.WRITE, Lane.TO_DEVICE, Lane.TO_HOST)]


def _tid(row: str, number: int) -> int:
    return 1 + 1000 * _ORDER.index(row) + number


def _label(what: str, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": tid, "name": what, "args": args}


def claim(path: str) -> None:
    """Makes the file, empty, so that a mistake in the path shows before the run. Raises ConfigError."""
    try:
        Path(path).write_text("")
    except OSError as error:
        raise ConfigError(f"tierflow.trace cannot be written ({error}): name a file in a folder that is there") from None


class StepTrace:
    """Records steps FIRST_STEP to LAST_STEP of an engine and writes them to ``path`` when they are over.

    A run that is closed earlier leaves what there is by then. What goes wrong with the file then is a warning.
    """

    def __init__(self, engine: Engine, path: str):
        self.path = Path(path)
        self._engine, self._done = engine, 0
        self._steps: list[tuple[str, float, float]] = []
        self._samples: list[Sample] = []
        self._began: float | None = None
        engine.on_step, engine.on_close = self._step_ended, self._finish

    def _step_ended(self) -> None:
        self._done += 1
        now = time.perf_counter()
        if self._began is not None:
            self._steps.append((f"step {self._done}", self._began, now))
            self._began = now
        if self._done == FIRST_STEP - 1:
            self._start(now)
        elif self._done == LAST_STEP:
            self._finish()

    def _start(self, now: float) -> None:
        self._began = now
        self._engine.manager.timeline.record()
        self._before = self._engine.manager.observer
        self._engine.manager.observer = self._observe
        self._observe()

    def _observe(self) -> None:
        self._before()
        held = {tier.name: self._engine.manager.ledger.held(tier) for tier in (Tier.DEVICE, Tier.HOST)}
        if not self._samples or self._samples[-1][1] != held:
            self._samples.append((time.perf_counter(), held))

    def _finish(self) -> None:
        engine = self._engine
        engine.on_step = engine.on_close = _nothing
        timeline = engine.manager.timeline
        if self._began is not None:
            engine.manager.observer = self._before
        if not self._steps:
            log.warning("%s has no trace: the run ended before step %d did", self.path, FIRST_STEP)
            return
        spans = timeline.recorded()
        body = {
            "traceEvents": events(spans, self._steps, self._samples),
            "displayTimeUnit": "ms",
            "otherData": {"spans left out": timeline.dropped},
        }
        try:
            self.path.write_text(json.dumps(body))
        except OSError as error:  # the training is worth more than its trace
            log.warning("the trace could not be written: %s", error)


def _nothing() -> None:
    """Nobody listens any more."""
