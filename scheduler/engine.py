"""Binds a plan to a live model: brings units up before use, takes gradients in, runs the update."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tierflow.scheduler.bandwidth import paths_of, probe
from tierflow.scheduler.binding import Binder, raw
from tierflow.scheduler.due import DueUpdates
from tierflow.scheduler.grad_set import GradSet, norm_of
from tierflow.scheduler.gradients import GradSlot
from tierflow.scheduler.guard import EvictedParameterError, describe
from tierflow.scheduler.hooks import ModelHooks, in_backward
from tierflow.scheduler.idle import IdleGradients
from tierflow.scheduler.jobs import Job
from tierflow.scheduler.lookahead import LookAhead
from tierflow.scheduler.param_step import ParamStep
from tierflow.scheduler.plan import MemoryPlan
from tierflow.scheduler.rates import Bandwidths
from tierflow.scheduler.report import Report, make_report
from tierflow.scheduler.schedule import schedule_text
from tierflow.scheduler.speculation import PATIENCE, Speculation
from tierflow.scheduler.spill import SpilledGradients
from tierflow.scheduler.stager import Stager
from tierflow.scheduler.trace import NEVER, Recorder
from tierflow.scheduler.traffic import default_order
from tierflow.scheduler.units import Slot, Unit
from tierflow.scheduler.update import UpdateQueue
from tierflow.scheduler.values import Values
from tierflow.scheduler.watch import ComputeWatch, watch_model
from tierflow.swap import CapacityError, Chunk, Lanes, Lease, Manager, Tier, Traffic

log = logging.getLogger("tierflow")

#: Uses of one unit in a row between two looks ahead: memory may have become free meanwhile.
LOOK_EVERY = 4


@dataclass
class StepReport:
    """Running counters between two calls of ``take_report``: seconds and bytes."""

    update_seconds: float = 0.0
    kernel_seconds: float = 0.0
    grad_norm: float | None = None
    traffic: Traffic = field(default_factory=Traffic)


class Engine:
    """The live model's side of tierflow. Made by ``tierflow.offload``; ``close`` gives everything back.

    One thread trains at a time: forward on the caller's thread, backward on autograd's while the caller waits.
    """

    def __init__(
        self, model: nn.Module, units: list[Unit], plan: MemoryPlan, manager: Manager, prefetch: bool = True,
        update: str = "auto",
    ):  # fmt: skip
        self.model, self.units, self.plan, self.manager = model, units, plan, manager
        self.device = manager.pools[Tier.DEVICE].resident.arena.device
        self.recorder = Recorder(default_order(model, units))
        self.look_ahead = LookAhead(units, plan)
        self.binder = Binder(units, self.device, self)
        self.bandwidths: Bandwidths | None = None
        self.io_options: dict[str, Any] = {}
        self.drive: Bandwidths | None = None
        self.last_step: Lanes | None = None
        self.on_step: Callable[[], None] = lambda: None  # called after each update
        self.on_close: Callable[[], None] = lambda: None
        self._counters = StepReport()
        self.closed = False
        self._prefetching = prefetch
        self._warned = False
        self._looks = 0
        self._pins: dict[int, int] = {}
        self._where = {id(p): (u, s) for u in units for s, p in zip(u.slots, u.params, strict=True)}
        self.values = Values(self)
        self._patience = 0 if update == "speculative" else PATIENCE
        self.spilled = SpilledGradients(
            manager, units, plan.window, lambda index: self.updates.pending(units[index]), lambda: self.due.run(self.updates.rest)
        )
        self.due = self._make_updates(update != "immediate" and self._has_waits(update))
        idle = self.updates.stager.idle if self.due.deferred else None
        self.gradients = GradSet(manager, self.spilled, idle, self.due.before_gradient, self._arrived)
        manager.on_evict = lambda chunk: self.binder.unbind(self.units[chunk.unit])
        manager.on_move = lambda chunk, lease: self.binder.follow(self.units[chunk.unit], lease)
        manager.busy_aliases = self._aliased
        self.watch = ComputeWatch(manager.timeline, manager.lane)
        self.step_counts = {id(p): 0 for u in units if u.trainable for p in u.params}
        self._handles: list[Any] = []
        self.hooks: ModelHooks | None = None

    # ---- set-up

    def _has_waits(self, update: str) -> bool:
        """Whether deferring hides anything: without an accelerator the kernels' time is the processor's anyway."""
        if update != "auto" or self.device.type != "cpu":
            return update != "auto" or self.plan.placement.optimizer is not Tier.DEVICE
        return any(self.plan.homes.of_states(u) is Tier.NVME for u in self.units)

    def _make_updates(self, deferred: bool) -> DueUpdates:
        plan = self.plan
        idle = IdleGradients(self.manager.pools[Tier.HOST].working.debug)
        on_device = plan.placement.kernels_reach_device  # where an accelerator updates, that is work of the current stream
        stager = Stager(self.manager, on_device, not on_device, plan.placement.rule, idle, self.spilled)
        queue = UpdateQueue(
            stager, plan.piece_elements, plan.pieces_in_flight, self._victims_beyond, self._in_turn, plan.landing(self.units)
        )
        return DueUpdates(queue, self.recorder, self.binder, self.units, deferred, self._prefetching, self._viewed)

    def attach(self) -> None:
        """Binds parameters, gradients and hooks; the homes hold their bytes already."""
        hooked = bool(self.plan.homes.streamed(self.units)) or self.due.deferred
        if not hooked:
            self._handles += watch_model(self.watch, self.model)
        for unit in self.units:
            if self.manager.home(unit.chunk) is Tier.DEVICE:
                self.binder.bind(unit, self.manager.memory(unit.chunk, Tier.DEVICE))
            else:
                self.binder.unbind(unit)
                self.binder.shut(unit)
            if unit.trainable:
                self.gradients.add(unit)
        if self.plan.spare:
            self.due.speculation = Speculation(
                self.updates, self.recorder, self.units, self.gradients.slots, self._busy, self.binder.shut, self._patience
            )  # fmt: skip
        self.values.user_writes.note()
        named = ((c.id, f"{u.label} {kind.value}") for u in self.units for kind in u.chunks for c in u.parts(kind))
        self.manager.timeline.names.update(named)
        if hooked:
            self.hooks = ModelHooks(self, self.model, self.units)

    def _arrived(self, param_id: int) -> None:
        """A gradient was accumulated."""
        if self.speculation is not None:
            self.speculation.arrived(param_id)
        if in_backward():
            if self.hooks is not None:
                self.hooks.running.watch.in_backward()
            self.due.pulse()

    def keep(self, hook: Any) -> None:
        """Takes over the handle of a hook, to remove it at the close."""
        self._handles.append(hook)

    # ---- use of units

    def where(self, param: nn.Parameter) -> tuple[Unit, Slot]:
        """The parameter's unit and place in it."""
        return self._where[id(param)]

    def _learning(self) -> bool:
        return torch.is_grad_enabled() or in_backward()

    def victims(self, beyond: int = -1) -> Callable[[Tier], Iterable[Chunk]]:
        """Cached copies, the farthest next use first; only those used later than ``beyond`` uses ahead."""
        trace = self.recorder.current(self._learning())

        def order(tier: Tier) -> Iterable[Chunk]:
            held = [(trace.next_use(chunk.unit), chunk) for chunk in self.manager.cached(tier)]
            return [chunk for use, chunk in sorted(held, key=lambda s: -s[0]) if use > beyond]

        return order

    def _victims_beyond(self, unit: Unit | None) -> Callable[[Tier], Iterable[Chunk]]:
        trace = self.recorder.current(self._learning())
        return self.victims() if unit is None else self.victims(trace.next_use(unit.index))

    def _in_turn(self, unit: Unit) -> bool:
        """Whether all weights that are used sooner than the unit's are on DEVICE, or on their way."""
        trace, manager = self.recorder.current(self._learning()), self.manager
        until = trace.next_use(unit.index)
        sooner = [self.units[i].chunk for i in trace.upcoming(until - 1)] if until != NEVER else []
        return all(
            manager.home(c) is Tier.DEVICE or manager.ledger.valid(c, Tier.DEVICE) or c in manager.fetches for c in sooner
        )

    def _fetch(self, unit: Unit) -> None:
        """Brings the unit with its newest weights on its way to DEVICE."""
        self.due.finish(unit)
        try:
            self.manager.fetches.start(unit.chunk, self.victims())
        except CapacityError:
            if not self.updates:
                raise
            self.due.run(self.updates.rest)  # what it holds for units that come later
            self.manager.fetches.start(unit.chunk, self.victims())

    @property
    def updates(self) -> UpdateQueue:
        """The updates that are due."""
        return self.due.queue

    @property
    def speculation(self) -> Speculation | None:
        """Updates that run in the backward, where they may."""
        return self.due.speculation

    @property
    def failed(self) -> str | None:
        """What left the training state inconsistent."""
        return self.due.failed

    def settle(self, units: Iterable[Unit] | None = None) -> None:
        """Runs the updates that are due, of some units or all, until their homes hold them."""
        if self.updates:
            self.usable()
        self.due.settle(units)
        if units is None:  # what is saved now is to agree with weights that the user has written
            self.values.user_writes.follow(self.victims())
            self.values.user_writes.note()

    def refuse(self) -> None:
        """The step that ``expect_step`` announced does not come: nothing was updated."""
        self.due.refuse()

    def acquire(self, unit: Unit, foreseen: bool = True) -> None:
        """Pins the unit on DEVICE, fetching it if need be, and makes its parameters ordinary ones.

        ``foreseen``: part of the loop's order of use, which the trace learns.
        """
        self.usable()
        if self._pins.get(unit.index, 0) == 0:
            if foreseen:
                self._visit(unit)
            self._fetch(unit)
        lease = self.manager.pin(unit.chunk)
        self._pins[unit.index] = self._pins.get(unit.index, 0) + 1
        if self._pins[unit.index] == 1:
            if not self.binder.bound(unit):
                self.binder.bind(unit, lease)
            self.binder.open(unit)
        if foreseen and self._pins[unit.index] == 1:
            try:
                self.prefetch()
            except BaseException:  # another unit's read failed; the caller does not hold this one then
                self.release(unit)
                raise

    def release(self, unit: Unit) -> int:
        """Undoes one ``acquire``; the copy stays cached and its parameters guard themselves again. Returns pins left."""
        self._pins[unit.index] -= 1
        self.manager.unpin(unit.chunk)
        if self._pins[unit.index] == 0 and self.manager.home(unit.chunk) is not Tier.DEVICE:
            self.binder.shut(unit)
        return self._pins[unit.index]

    def touch(self, unit: Unit) -> Lease:
        """Brings the unit to DEVICE for the operation that asks; a live alias of it keeps it there."""
        self._visit(unit)
        self._fetch(unit)
        return self.manager.lend(unit.chunk)

    def _visit(self, unit: Unit) -> None:
        """Notes the use."""
        self.manager.fetches.pump()
        self.due.pulse()
        self._looks = 0 if self.recorder.visit(unit.index, self._learning()) else self._looks + 1

    def prefetch(self) -> None:
        """Starts fetches of what comes next, as far as memory goes without giving up what is needed sooner."""
        if not self._prefetching or self._looks % LOOK_EVERY:
            return
        trace = self.recorder.current(self._learning())
        for index in self.look_ahead.due(trace):
            chunk = self.units[index].chunk
            if self.look_ahead.enough(trace, len(self.manager.fetches), self.manager.fetches.nbytes):
                return
            if self.manager.ledger.valid(chunk, Tier.DEVICE) or chunk in self.manager.fetches:
                continue
            if self.due.newer_to_come(self.units[index]):
                return  # the queue brings it up, in this order
            if not self.manager.fetches.start(chunk, self.victims(trace.next_use(index)), hint=True):
                return

    def _aliased(self, chunk: Chunk, lease: Lease) -> bool:
        return lease.aliases() > self.binder.views(self.units[chunk.unit])

    def on_touch(self, params: list[Any], func: Any, args: tuple[Any, ...], caller: str) -> Any:
        """An evicted parameter met an operation: fetch it where a forward or backward runs, else raise.

        Returns the result for what ``state_dict`` and ``load_state_dict`` do, None if ``func`` is to run now.
        """
        self.usable()
        units = list(dict.fromkeys(self._where[id(p)][0] for p in params))
        if self.hooks is not None and self.hooks.inside():
            for unit in units:
                self.hooks.hold(unit)
            return None
        self.settle(units)
        if all(self.manager.home(unit.chunk) is Tier.DEVICE for unit in units):
            return None
        if caller == "_save_to_state_dict":
            return self.values.read(params[0])
        if caller == "_load_from_state_dict" and len(args) == 2 and args[0] is params[0]:
            return self.values.write(params[0], args[1])
        raise EvictedParameterError(params[0]._tierflow_name, describe(func))

    # ---- the step

    def usable(self) -> None:
        """Raises if the engine was closed or a transfer left it inconsistent."""
        if self.closed:
            raise RuntimeError("this tierflow engine is closed: its memory was given back")
        if self.failed:
            raise RuntimeError(f"an earlier error left the training state inconsistent ({self.failed}); "
                               "resume from a checkpoint")  # fmt: skip

    def grad_norm(self, slots: list[GradSlot]) -> float:
        """Euclidean norm of these gradients."""
        self._counters.grad_norm = norm_of(slots)
        return self._counters.grad_norm

    def update(self, steps: dict[int, ParamStep], slots: list[GradSlot]) -> None:
        """Runs the update of every slot; ``steps`` by id of parameter."""
        self.usable()
        began = time.perf_counter()
        if self.hooks is not None:
            self.hooks.reset()
        if any(self._pins.values()):
            raise RuntimeError("optimizer.step() inside `with tierflow.gathered(...)`: leave the block first")
        self.due.settle_unused()
        ready = {id(s.param): s for s in slots}
        self.values.user_writes.follow(self.victims())
        jobs = []
        for unit in self.units:
            entries = [(ready[id(p)], steps[id(p)]) if id(p) in ready else None for p in unit.params]
            if any(entries):
                jobs.append(Job(unit, entries, whole=self.due.deferred))
        left = self.due.resolve(jobs)
        for job in jobs:
            self.values.changed(job.unit)
            with raw():
                torch.autograd.graph.increment_version(job.unit.params)
        self.values.user_writes.note()
        if self.recorder.step_ended() and self.recorder.departures and not self._warned:
            self._warned = True
            log.warning("the order in which modules run has changed between steps; prefetch follows the new order")
        self.due.add(left)
        self._counters.update_seconds += time.perf_counter() - began
        self.last_step = self.manager.timeline.take()
        self.look_ahead.learn(self.recorder.trace, self.last_step)
        self.on_step()

    def left_out(self, uses: int) -> None:
        """The step was over after so many uses, without an update."""
        self.refuse()
        if self.recorder.uses == uses and not any(self._pins.values()):
            self.update({}, [])
        else:  # in the middle of the next one
            self.recorder.step_ended(uses)

    def _busy(self, unit: Unit) -> bool:
        return bool(self._pins.get(unit.index)) or self._viewed(unit)

    def _viewed(self, unit: Unit) -> bool:
        if not self.manager.ledger.valid(unit.chunk, Tier.DEVICE):
            return False
        return self._aliased(unit.chunk, self.manager.memory(unit.chunk, Tier.DEVICE))

    def report(self, lanes: Lanes | None = None, steps: int = 1) -> Report:
        """Where the time of the last finished step went (or ``lanes``, the mean of ``steps``), beside its floor.

        The first call measures the paths in use, for two seconds (the drive only without a profile). Raises RuntimeError before the first step has ended.
        """
        lanes = lanes or self.last_step
        if lanes is None:
            raise RuntimeError("there is nothing to report before the first optimizer.step() has ended")
        if self.bandwidths is None:
            store = self.manager.store
            placement, folders = self.plan.placement, [path.path for path in store.paths] if store else None
            self.bandwidths = probe(paths_of(self.units, placement, self.device, folders, self.io_options, self.drive))
        trained = sum(u.chunk.numel for u in self.units if u.trainable)
        return make_report(lanes, self.plan, self.bandwidths, trained, steps)

    def schedule(self) -> str:
        """The schedule of a step, as text: what is used in which order, when it comes up and goes, what is updated."""
        return schedule_text(self.units, self.plan, self.recorder.trace.order, self._prefetching, self.look_ahead)

    def take_report(self) -> StepReport:
        """The counters since the last call, and fresh ones. The timeline begins anew."""
        self.manager.timeline.take()
        report, self._counters = self._counters, StepReport()
        report.traffic, self.manager.traffic = self.manager.traffic, Traffic()
        report.kernel_seconds, self.due.kernel_seconds = self.due.kernel_seconds, 0.0
        return report

    # ---- the end

    def close(self) -> None:
        """Ends transfers, takes hooks off, gives memory and disk back. Parameters become empty of data."""
        if self.closed:
            return
        self.closed = True
        self.on_close()
        for handle in self._handles:
            handle.remove()
        if self.hooks is not None:
            self.hooks.remove()
        for unit in self.units:
            for p in unit.params:
                with raw():
                    p.grad = None
            self.binder.unbind(unit)
            self.binder.shut(unit)
        self.updates.abandon()
        self.updates.stager.close()
        self.updates.stager.idle.close()
        self.gradients.close()
        self.manager.close()
