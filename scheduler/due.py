"""The updates that steps leave to do: when each runs, and what an error in one means for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from tierflow.scheduler.binding import Binder
from tierflow.scheduler.hooks import in_backward
from tierflow.scheduler.jobs import Job
from tierflow.scheduler.speculation import Speculation
from tierflow.scheduler.trace import Recorder
from tierflow.scheduler.units import Unit
from tierflow.scheduler.update import UpdateQueue
from tierflow.swap import Tier

T = TypeVar("T")


class DueUpdates:
    """Runs queued updates no later than their result is needed.

    ``deferred``: each before its unit's next use; else all in the step. ``read_ahead``: states may be read before the
    step that needs them. ``viewed``: whether somebody holds a view of a unit's weights.
    """

    def __init__(
        self, queue: UpdateQueue, recorder: Recorder, binder: Binder, units: list[Unit], deferred: bool,
        read_ahead: bool, viewed: Callable[[Unit], bool],
    ):  # fmt: skip
        self.queue, self.deferred = queue, deferred
        self.speculation: Speculation | None = None
        self.failed: str | None = None
        self.kernel_seconds = 0.0
        self._recorder, self._binder, self._units = recorder, binder, units
        self._read_ahead, self._viewed = read_ahead, viewed
        queue.stager.manager.reclaim = lambda: self.run(queue.reclaim)

    def run(self, part: Callable[[], T]) -> T:
        """Runs a part of what is due; after an error there the training state is inconsistent."""
        before = self.queue.stager.kernel_seconds
        try:
            return part()
        except BaseException as error:
            self.failed = f"{type(error).__name__} in the update: {error}"
            self.queue.abandon()
            raise
        finally:
            self.kernel_seconds += self.queue.stager.kernel_seconds - before

    # ---- as units are used

    def pulse(self) -> None:
        """Goes as far as it can without waiting."""
        backward = in_backward()
        speculating = self.speculation is not None and self.speculation.active
        if self.speculation is not None and backward:
            self.run(self.speculation.advance)
        if self.queue:
            self.run(lambda: self.queue.advance(states_may_wait=not backward))
        if backward and self.deferred and self._read_ahead and self._recorder.learned and not speculating:
            self.run(lambda: self.queue.foresee(self._in_order_of_use))

    def _in_order_of_use(self) -> Iterable[Unit]:
        return (self._units[i] for i in self._recorder.first_uses)

    def newer_to_come(self, unit: Unit) -> bool:
        """Whether what a fetch would bring now is not what the unit's next use is to see."""
        return not self.queue.may_fetch(unit) or self._holds(unit)

    def _holds(self, unit: Unit) -> bool:
        return self.speculation is not None and self.speculation.holds(unit)

    def finish(self, unit: Unit) -> None:
        """Until the unit's weights are those of the last step, and a fetch may bring them."""
        if self._holds(unit):
            speculation = self.speculation
            self.run(lambda: speculation.undo(unit))  # type: ignore[union-attr]
        if self.queue.job(unit) is not None:
            self.run(lambda: self.queue.finish(unit))

    def before_gradient(self, unit: Unit) -> None:
        """A gradient's memory is about to change: an update may still need it, or borrow it."""
        if self.queue.pending(unit):
            self.finish(unit)
        self.run(lambda: self.queue.vacate(unit))

    def settle(self, units: Iterable[Unit] | None = None) -> None:
        """Runs what is due for some units, or all, until their homes hold it."""
        self.refuse()
        if units is None:
            self.run(self.queue.settle)
        units = self._units if units is None else list(units)
        for unit in units:
            self._settle_unit(unit)
            if self.queue.stager.manager.home(unit.chunk) is Tier.DEVICE:
                self._binder.open(unit)  # weights that live there are ordinary again

    def _settle_unit(self, unit: Unit) -> None:
        if self.queue.job(unit) is not None:
            self.run(lambda: self.queue.end(unit))

    # ---- at the step

    def settle_unused(self) -> None:
        """What the last forward did not use is still due from the step before."""
        for unit in self.queue.units():
            if self.queue.pending(unit) and not self._holds(unit):
                self._settle_unit(unit)
        self.queue.stager.manager.fetches.settle()

    def resolve(self, jobs: list[Job]) -> list[Job]:
        """What the backward has not done already."""
        if self.speculation is None:
            return jobs
        left: list[Job] = []
        speculation = self.speculation
        self.run(lambda: left.extend(speculation.resolve(jobs)))
        return left

    def refuse(self) -> None:
        """The step that the backward counted on does not come: nothing was updated."""
        if self.speculation is not None:
            self.run(self.speculation.undo_all)

    def add(self, jobs: list[Job]) -> None:
        """The updates of a step: at once, or each before its unit is used again."""
        order = {u: i for i, u in enumerate(self._recorder.first_uses)}
        self.queue.add(sorted(jobs, key=lambda job: order.get(job.unit.index, len(order))))
        if not self.deferred:
            self.settle()
            return
        self.settle([job.unit for job in jobs if self._viewed(job.unit)])  # the view is to show the new weights
        for job in jobs:
            if not job.ended:
                self._binder.shut(job.unit)
        self.run(lambda: self.queue.advance(states_may_wait=True))
