"""Updates that run in the backward, before it is known that nothing stands against them, and are undone if it does.

[Note: what may stand against an update] Clipping, a gradient that is not finite, a hyperparameter that changes before
the step, a gradient that was not final (a block shared by checkpoints delivers partial sums), a use of the weights that
the trace did not foresee. So an update in the backward writes to a second slot and leaves the first as it was; weights
that live in memory are copied to the second slot before they change. ``commit`` lets the slots change places, ``undo``
forgets the new values. Either way the bits are those of an update done at the step. (SuperOffload, arXiv:2509.21271,
calls this speculation-then-validation.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tierflow.scheduler.gradients import GradSlot
from tierflow.scheduler.jobs import Entry, Job, kinds
from tierflow.scheduler.param_step import ParamStep
from tierflow.scheduler.trace import Recorder
from tierflow.scheduler.units import Unit
from tierflow.scheduler.update import UpdateQueue
from tierflow.swap import CapacityError, Kind, Tier

#: Steps in a row that needed no clipping before "auto" counts on another one.
PATIENCE = 4


@dataclass(eq=False)
class Attempt:
    """A unit's update in this backward, and how often its gradients had been written when it was started."""

    job: Job
    writes: list[int]

    def stands(self, entries: list[Entry | None]) -> bool:
        """Whether the step asks for exactly what was done."""
        return entries == self.job.entries and self.writes == _writes(entries)


def _writes(entries: list[Entry | None]) -> list[int]:
    return [entry[0].writes for entry in entries if entry is not None]


class Speculation:
    """Watches gradients arrive and starts each unit's update as soon as nothing is expected to come after."""

    def __init__(
        self, queue: UpdateQueue, recorder: Recorder, units: list[Unit], slots: dict[int, GradSlot],
        busy: Callable[[Unit], bool], on_attempt: Callable[[Unit], None], patience: int = PATIENCE,
    ):  # fmt: skip
        self._queue, self._recorder, self._busy, self._patience = queue, recorder, busy, patience
        self._slots = slots
        self._units = {id(p): u for u in units for p in u.params if self._suits(u)}
        self._steps: dict[int, ParamStep] | None = None
        self._arrived: dict[int, int] = {}
        self._expected: dict[int, int] = {}
        self._ready: list[Unit] = []
        self._attempts: dict[int, Attempt] = {}
        self._unclipped = 0
        self.committed = self.undone = 0
        self._on_attempt = on_attempt  # the unit's weights are no longer those that count

    def _suits(self, unit: Unit) -> bool:
        return any(self._queue.stager.manager.nvme.has_spare(chunk) for chunk in unit.states)

    # ---- in the backward

    def start(self, steps: dict[int, ParamStep]) -> None:
        """A step begins; ``steps`` are those of an update that nothing stands against."""
        self._arrived.clear()
        self._ready.clear()
        promising = self._unclipped >= self._patience and bool(self._expected) and self._recorder.learned
        self._steps = steps if promising else None

    @property
    def active(self) -> bool:
        """Whether this step's updates are tried in its backward."""
        return self._steps is not None

    def arrived(self, param_id: int) -> None:
        """A gradient was accumulated."""
        self._arrived[param_id] = self._arrived.get(param_id, 0) + 1
        unit = self._units.get(param_id)
        if self._steps is None or unit is None or unit.index in self._attempts or unit in self._ready:
            return
        params = [id(p) for p in unit.params]
        if all(self._arrived.get(p) == self._expected.get(p) for p in params) and any(p in self._steps for p in params):
            self._ready.append(unit)

    def advance(self) -> None:
        """Starts the updates of units whose gradients are final and whose weights nobody needs any more."""
        for unit in list(self._ready):
            if self._recorder.trace.comes_again(unit.index) or self._busy(unit):
                continue
            self._ready.remove(unit)
            entries = [self._entry(id(p)) for p in unit.params]
            job = Job(unit, entries, whole=True, speculative=True)
            self._attempts[unit.index] = Attempt(job, _writes(entries))
            self._queue.add([job])
            self._on_attempt(unit)

    def _entry(self, param_id: int) -> Entry | None:
        assert self._steps is not None
        present = param_id in self._steps and self._slots[param_id].present()
        return (self._slots[param_id], self._steps[param_id]) if present else None

    def holds(self, unit: Unit) -> bool:
        """Whether the unit's newest bytes are those of an update that does not count yet."""
        return unit.index in self._attempts

    # ---- at the step

    def resolve(self, jobs: list[Job]) -> list[Job]:
        """Commits the updates that the step asks for and undoes the others; returns the jobs that are left to do."""
        left = []
        for unit in [a.job.unit for a in self._attempts.values() if not a.job.begun]:
            self.undo(unit)  # before what follows begins it
        for job in jobs:
            attempt = self._attempts.get(job.unit.index)
            if attempt is not None and attempt.stands(job.entries):
                self._commit(attempt)
            else:
                left.append(job)
        self.undo_all()
        self._expected, self._arrived = self._arrived, {}
        self._steps = None
        self._ready.clear()
        unclipped = all(e[1].clip == 1.0 for job in jobs for e in job.entries if e is not None)
        self._unclipped = self._unclipped + 1 if unclipped else 0
        return left

    def undo_all(self) -> None:
        """The step did not come, or not like this."""
        for attempt in list(self._attempts.values()):
            self.undo(attempt.job.unit)

    def _commit(self, attempt: Attempt) -> None:
        unit, manager = attempt.job.unit, self._queue.stager.manager
        self._queue.finish(unit)  # every read of the first slot and write to the second has been started
        for chunk in kinds(unit).values():
            if manager.home(chunk) is Tier.NVME:
                manager.nvme.flip(chunk)
        del self._attempts[unit.index]
        self.committed += 1

    def undo(self, unit: Unit) -> None:
        """Weights and states are again those of before the backward."""
        attempt = self._attempts.pop(unit.index)
        self._ready = [u for u in self._ready if u is not unit]
        if self._queue.cancel(unit):
            return
        self._queue.end(unit)
        self._unclipped = 0
        self.undone += 1
        manager = self._queue.stager.manager
        for kind, chunk in kinds(unit).items():
            if manager.home(chunk) is Tier.NVME:
                manager.drop_copies(chunk)
            else:
                self._restore(attempt.job, kind)

    def _restore(self, job: Job, kind: Kind) -> None:
        stager = self._queue.stager
        try:
            stager.restore(job, kind, self._queue.any_victims())
        except CapacityError:
            self._queue.rest()  # others' pieces fill the staging memory
            stager.restore(job, kind, self._queue.any_victims())
