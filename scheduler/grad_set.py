"""All gradients of a model: where the memory of each is, and what they are together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tierflow.scheduler.binding import raw
from tierflow.scheduler.gradients import GradContext, GradSlot, weakly, while_alive
from tierflow.scheduler.idle import IdleGradients
from tierflow.scheduler.scaling import Scaling
from tierflow.scheduler.spill import SpilledGradients
from tierflow.scheduler.units import Unit
from tierflow.swap import HostLane, Kind, Manager, Tier


class GradSet:
    """Slots by id of parameter.

    ``before_write``: called with the unit of a gradient whose memory is about to change; ``arrived``: with the id of a
    parameter whose gradient was accumulated. ``idle``: takes memory of gradients that hold nothing, if that is of use.
    """

    def __init__(
        self, manager: Manager, spilled: SpilledGradients, idle: IdleGradients | None, before_write: Callable[[Unit], None],
        arrived: Callable[[int], None],
    ):  # fmt: skip
        self._manager, self._spilled, self._idle = manager, spilled, idle
        self._on_write, self._on_arrival = before_write, arrived
        self._units: dict[int, Unit] = {}
        self._handles: list[Any] = []
        self.slots: dict[int, GradSlot] = {}
        self.scaling = Scaling()

    def add(self, unit: Unit) -> None:
        """Gives the gradients of the unit their memory, and takes them in from now on."""
        chunk, access = unit.chunks[Kind.GRAD], self._spilled.access(unit)
        lease = None if access else self._manager.memory(chunk, self._manager.home(chunk))
        memory = self._spilled.memory(unit) if lease is None else lease.bytes()[: chunk.nbytes]
        flat = memory.view(unit.layouts[Kind.GRAD].dtype)
        keeps = lease is not None and self._idle is None and isinstance(self._manager.lane, HostLane)
        if lease is not None and not keeps:
            flat.zero_()  # its pages are there before the first step
        context = GradContext(
            self._manager.lane, self.scaling, self._manager.timeline, keeps, while_alive(self._before_write),
            while_alive(self._arrived), access,
        )  # fmt: skip
        for slot, p in zip(unit.slots, unit.params, strict=True):
            self._units[id(p)] = unit
            grad = self.slots[id(p)] = GradSlot(
                slot.names[0], p, flat[slot.offset : slot.offset + slot.numel].view(slot.shape), context
            )
            with raw():
                self._handles.append(p.register_post_accumulate_grad_hook(weakly(grad)))
        del flat, memory  # which would count as somebody's views
        slots = [self.slots[id(p)] for p in unit.params]
        if lease is None:
            self._spilled.register(unit, slots)
        elif self._idle is not None and self._manager.home(chunk) is Tier.HOST:
            self._idle.register(unit, lease, slots)

    def _before_write(self, slot: GradSlot) -> None:
        self._on_write(self._units[id(slot.param)])

    def _arrived(self, slot: GradSlot) -> None:
        self._on_arrival(id(slot.param))

    def rest(self) -> None:
        """Lets go of what was kept of gradients that were dropped."""
        for slot in self.slots.values():
            slot.rest()

    def present(self, units: list[Unit]) -> list[GradSlot]:
        """Slots of the parameters that have a gradient now, in parameter order."""
        order = sorted(((s.order, p) for u in units if u.trainable
                        for s, p in zip(u.slots, u.params, strict=True)), key=lambda e: e[0])  # fmt: skip
        return [slot for _, p in order if (slot := self.slots[id(p)]).collect()]

    def close(self) -> None:
        """Takes the hooks off and lets go of the memory."""
        for handle in self._handles:
            handle.remove()
        for slot in self.slots.values():
            slot.close()
        self.slots.clear()
        self._units.clear()
        self._spilled.close()


def norm_of(slots: list[GradSlot]) -> float:
    """Euclidean norm of all gradients: per-parameter sums of squares (fp64) added in the order given."""
    total = 0.0
    for slot in slots:
        total += slot.stats().sum_squares
    return total**0.5
