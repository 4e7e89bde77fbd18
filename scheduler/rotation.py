"""Layer-major accumulation: several micro-batches take turns, so that a fetched unit serves all of them.

[Note: turns] Each micro-batch's forward and backward runs in a thread of its own, for autograd keeps its state by
thread, but one runs at a time: whoever has the turn. A micro-batch that comes to another unit than it was at gives
the turn away: first to those that want the unit that is there now, then to the one whose unit the trace says comes
next. So unit k serves micro-batches 0, 1, 2, ... before anyone goes on to unit k + 1, and the order of use is that of one
micro-batch alone. The turn to the backward is no change of unit: a head's forward, the loss and the head's backward
run without a break, so that the logits of one micro-batch exist at a time.

Where micro-batches take different ways (experts, early exit) they meet again where they can; a micro-batch that waits
for an earlier one's gradient ([Note: order of deliveries]) or for room is passed over until that has come. Units that
the waiting ones have pinned are to lie within what the running one needs anyway, which the plan has room for: so one
whose way leads elsewhere waits until those have left the modules that they are in.

[Note: stopping] After an error, or Ctrl-C in the caller, every other micro-batch raises ``Stopped`` at its next chance
to give the turn away, and unwinds with the turn in its hands, one after the other.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tierflow.scheduler.ambient import Ambient, RandomStreams
from tierflow.scheduler.deliveries import Delivered, Deliveries
from tierflow.scheduler.hooks import ModelHooks, Running
from tierflow.scheduler.watch import ComputeWatch
from tierflow.swap import Lane

if TYPE_CHECKING:
    from tierflow.scheduler.engine import Engine

#: A micro-batch's forward and backward; what it returns is the caller's.
Job = Callable[[], Any]


class Stopped(BaseException):
    """Unwinds a micro-batch after an error elsewhere. Not an Exception: no model's code is to catch it."""


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate


@dataclass(eq=False)
class Turn:
    """One micro-batch on its way. ``gate`` opens when it gets the turn."""

    index: int
    job: Job
    running: Running
    gate: threading.Lock = field(default_factory=_closed_gate)
    phase: str | None = None
    unit: int | None = None  # where it is, or wants to go next
    waits: Callable[[], bool] | None = None  # until this is true
    starved: bool = False  # until another one has come further
    result: Any = None
    delivered: Delivered = field(init=False)

    def __post_init__(self) -> None:
        self.delivered = Delivered(self.index)

    @property
    def finished(self) -> bool:
        """Whether it has ended, well or not."""
        return self.delivered.finished


class Rotation:
    """Runs micro-batches of one engine, one after the other or in turns."""

    def __init__(self, engine: Engine):
        self._engine = engine
        watched = engine.units if engine.hooks is not None else []  # else there are no turns to take
        self._deliveries = Deliveries((p for u in watched for p in u.params), self._arriving)
        self._turns: list[Turn] = []
        self._current: Turn | None = None
        self._unit: int | None = None
        self._streams: RandomStreams | None = None
        self._observer: Callable[[str | None], None] = lambda _phase: None
        self._error: BaseException | None = None
        self._stopping = False
        self._done = _closed_gate()
        self.drew = False

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        self._deliveries.close()

    def run(
        self, jobs: Sequence[Job], at_once: int, observer: Callable[[str | None], None] | None = None
    ) -> list[Any]:
        """Runs all jobs, ``at_once`` of them in turns, and returns what they returned, in order.

        ``observer`` is told the phase of whoever runs, and None at the end. Raises what a job raised, after all
        others have unwound. ``drew`` then says whether the jobs that ran in turns drew random numbers.
        """
        self._observer = observer or self._observer
        manager = self._engine.manager
        watches = [ComputeWatch(manager.timeline, manager.lane) for _ in jobs]
        turns = [Turn(i, job, Running(watch)) for i, (job, watch) in enumerate(zip(jobs, watches, strict=True))]
        self.drew = False
        try:
            for first in range(0, len(turns), at_once):
                group = turns[first : first + at_once]
                self._run_alone(group[0]) if len(group) == 1 else self._run_group(group)
        finally:
            self._observer(None)
            self._observer = lambda _phase: None
        return [turn.result for turn in turns]

    def phase(self, name: str) -> None:
        """The running micro-batch says what it does now."""
        if self._current is not None:
            self._current.phase = name
        self._observer(name)

    # ---- one after the other

    def _run_alone(self, turn: Turn) -> None:
        self._turns, self._current = [turn], turn
        try:
            turn.result = turn.job()
        finally:
            self._deliveries.finish(turn.delivered)
            self._turns, self._current = [], None

    # ---- in turns

    def _run_group(self, turns: list[Turn]) -> None:
        hooks = self._hooks()
        self._turns, self._unit, self._error, self._stopping = turns, None, None, False
        self._done = _closed_gate()
        self._streams = RandomStreams(len(turns), self._engine.device)
        ambient, mine = Ambient(self._engine.device), hooks.running
        threads = [
            threading.Thread(
                target=ambient.context.copy().run, args=(self._live, turn, ambient),
                name=f"tierflow-micro-batch-{turn.index}", daemon=True,
            )
            for turn in turns
        ]  # fmt: skip
        hooks.rotation = self
        try:
            self._see_through(threads)
        finally:
            self._turns, self._current = [], None
            hooks.rotation, hooks.running = None, mine
            self.drew |= self._streams.end()
            self._streams = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _see_through(self, threads: list[threading.Thread]) -> None:
        """Starts the threads and waits until all micro-batches have ended, whatever arrives meanwhile."""
        asked: list[threading.Thread] = []
        self._turns[0].gate.release()
        try:
            for thread in reversed(threads):  # the first one runs as soon as it is there, so it comes last
                asked.append(thread)
                thread.start()
            self._done.acquire()
        except BaseException as interrupt:  # Ctrl-C reaches the caller's thread alone
            self._stopping, self._error = True, interrupt
            self._leave_out(threads, asked)
            while any(not t.finished for t in self._turns):
                with contextlib.suppress(KeyboardInterrupt):  # they unwind, with the engine in their hands
                    self._done.acquire(timeout=1.0)
        for thread in asked:
            if thread.is_alive():
                thread.join()

    def _leave_out(self, threads: list[threading.Thread], asked: list[threading.Thread]) -> None:
        """Takes threads that were not started out of the turns; the others must still unwind."""
        for _ in range(100):
            if asked[-1].ident is not None:
                break
            time.sleep(0.01)  # interrupted while it was starting
        for turn, thread in zip(self._turns, threads, strict=True):
            if thread.ident is None:
                turn.delivered.finished = True
        if self._turns[0].finished:  # nobody has the turn
            following = self._choose()
            if following is not None:
                following.gate.release()

    def _live(self, turn: Turn, ambient: Ambient) -> None:
        """The whole life of one micro-batch, in its thread."""
        turn.gate.acquire()
        try:
            self._resume(turn)
            if not self._stopping:
                with ambient.enter():
                    turn.result = turn.job()
        except Stopped:
            pass
        except BaseException as error:
            self._fail(error)
        self._end(turn)

    def _fail(self, error: BaseException) -> None:
        self._stopping = True
        self._error = self._error or error

    def _end(self, turn: Turn) -> None:
        """Gives up what the micro-batch still holds, then the turn for good."""
        try:
            self._hooks().reset()
            self._suspend(turn)
        except BaseException as error:
            self._fail(error)
        self._deliveries.finish(turn.delivered)
        self._came_further()
        following = self._choose()
        (self._done if following is None else following.gate).release()

    # ---- handing over

    def arrive(self, unit: int) -> None:
        """The running micro-batch comes to ``unit``: others may go first."""
        turn = self._current
        assert turn is not None
        if self._stopping:
            raise Stopped
        if turn.unit == unit:
            return
        turn.unit = unit
        self._came_further()
        self._give_turn_away(turn)
        self._unit = unit

    def wait_for_room(self) -> bool:
        """There is no memory for what the running micro-batch needs: lets others go on; False if none can."""
        turn = self._current
        assert turn is not None
        turn.starved = True
        if self._choose() is None:
            turn.starved = False
            return False
        self._give_turn_away(turn)
        return True

    def _arriving(self, key: int) -> None:
        """Autograd is about to add a gradient. See [Note: order of deliveries]."""
        turn = self._current
        if turn is None:
            return
        mine, others = turn.delivered, [t.delivered for t in self._turns]
        if not self._deliveries.may(mine, others, key):
            turn.waits = lambda: self._deliveries.may(mine, others, key)
            self._give_turn_away(turn)
            turn.waits = None
        self._deliveries.note(mine, others, key)

    def _came_further(self) -> None:
        for turn in self._turns:
            turn.starved = False

    def _choose(self) -> Turn | None:
        """Who goes next: see [Note: turns]."""
        left = [t for t in self._turns if not t.finished]
        if not self._stopping:
            left = [t for t in left if not t.starved and (t.waits is None or t.waits())]
        trace = self._engine.recorder.trace
        pinned = {unit for t in self._turns for unit in t.running.units()}

        def rank(turn: Turn) -> tuple[bool, int, int]:
            if turn.unit is None:  # it has not begun, and pins nothing before it has arrived somewhere
                return False, -1, turn.index
            beyond = bool(pinned - turn.running.units() - {turn.unit})
            return beyond, 0 if turn.unit == self._unit else trace.next_use(turn.unit), turn.index

        return min(left, key=rank, default=None)

    def _give_turn_away(self, turn: Turn) -> None:
        following = self._choose()
        if following is not None and following is not turn:
            self._suspend(turn)
            following.gate.release()
            began = time.perf_counter()
            turn.gate.acquire()
            self._engine.manager.timeline.wait(Lane.COMPUTE, "other micro-batches' turns", began)
            self._resume(turn)
        if self._stopping:
            raise Stopped

    def _suspend(self, turn: Turn) -> None:
        assert self._streams is not None
        self._streams.suspend(turn.index - self._turns[0].index)

    def _resume(self, turn: Turn) -> None:
        assert self._streams is not None
        self._current, self._hooks().running = turn, turn.running
        self._streams.resume(turn.index - self._turns[0].index)
        self._observer(turn.phase)

    def _hooks(self) -> ModelHooks:
        found = self._engine.hooks
        assert found is not None  # weights that stay on DEVICE give no chance to take turns
        return found
