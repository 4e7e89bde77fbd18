"""Gradients that live on NVMe, where host memory has no room for all: in memory while they change or are looked at.

A backward fills one unit's gradients after another's. So there is a window for two units: while one's arrive, those of the
one before are written. An update reads them piece by piece with the states, or takes them where they still are.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tierflow.scheduler.gradients import GradSlot, WatchedGradients
from tierflow.scheduler.units import Unit
from tierflow.swap import CapacityError, Chunk, Kind, Manager, PagedMemory, Tier, paged_bytes


@dataclass(eq=False)
class _Gradients:
    """One unit's. ``stored``: of what NVMe has, how often they had changed; ``held``: by how many they must stay."""

    chunk: Chunk
    watched: WatchedGradients
    stored: int = -1
    held: int = 0

    @property
    def nbytes(self) -> int:
        return paged_bytes(self.chunk.nbytes)

    def changes(self) -> int:
        return sum(slot.writes for slot in self.watched.slots)


@dataclass(frozen=True)
class Access:
    """One unit's gradients' way to their memory, without a reference that a collector cannot see."""

    _spilled: weakref.ref[SpilledGradients]
    _index: int

    def need(self) -> None:
        """Brings them there. Raises RuntimeError after the engine was dropped."""
        spilled = self._spilled()
        if spilled is None:
            raise RuntimeError("this gradient was on NVMe, and the optimizer that it belonged to is gone: clone it before")
        spilled.need(self._index)

    def hold(self) -> None:
        """Keeps them there."""
        if (spilled := self._spilled()) is not None:
            spilled.hold(self._index)

    def let_go(self) -> None:
        """Undoes a ``hold``."""
        if (spilled := self._spilled()) is not None:
            spilled.let_go(self._index)


class SpilledGradients:
    """``window``: bytes that may be in memory at once. ``due``: whether a unit's update has still to see its gradients.
    ``rest``: ends whatever holds some of them.
    """

    def __init__(
        self, manager: Manager, units: list[Unit], window: int, due: Callable[[int], bool], rest: Callable[[], None]
    ):
        chunks = {u.index: u.chunks[Kind.GRAD] for u in units if u.trainable and manager.home(u.chunks[Kind.GRAD]) is Tier.NVME}
        self._memory = PagedMemory(manager, list(chunks.values()))
        self._units = {index: _Gradients(chunk, WatchedGradients([])) for index, chunk in chunks.items()}
        self._largest = max((g.nbytes for g in self._units.values()), default=0)
        self._window, self._due, self._rest = window, due, rest
        self._here: OrderedDict[int, _Gradients] = OrderedDict()  # the least recently used first

    def __contains__(self, unit: Unit) -> bool:
        return unit.index in self._units

    def memory(self, unit: Unit) -> torch.Tensor:
        """Of all the unit's gradients, as uint8."""
        return self._memory.bytes(self._units[unit.index].chunk)

    def access(self, unit: Unit) -> Access | None:
        """What the unit's gradients know of this; None if they live in memory."""
        return Access(weakref.ref(self), unit.index) if unit in self else None

    def register(self, unit: Unit, slots: list[GradSlot]) -> None:
        """The unit's gradients are those of ``slots``."""
        self._units[unit.index].watched = WatchedGradients(slots)

    def here(self, unit: Unit) -> bool:
        """Whether the unit's gradients are in memory."""
        return unit.index in self._here

    def hold(self, index: int) -> None:
        """Keeps a unit's gradients there, until ``let_go``."""
        if index in self._units:
            self._units[index].held += 1

    def let_go(self, index: int) -> None:
        """Undoes a ``hold``."""
        if index in self._units:
            self._units[index].held -= 1

    def need(self, index: int) -> None:
        """Brings a unit's gradients to memory, to be looked at or changed there. Raises CapacityError and OSError."""
        gradients = self._units.get(index)
        if gradients is None:
            return
        self._end_write(gradients)
        if index == next(reversed(self._here), None):
            return
        if index not in self._here:
            self._make_room(gradients.nbytes)
            wanted = self._wanted(index)
            self._memory.bring(gradients.chunk, read=wanted)
            gradients.stored = gradients.changes() if wanted else -1
            self._here[index] = gradients
        self._here.move_to_end(index)
        oldest = next(iter(self._here))
        if self._free() < self._largest and oldest != index:  # room for the next unit
            self._write(oldest)

    def _free(self) -> int:
        return self._window - sum(g.nbytes for g in self._here.values())

    def _make_room(self, nbytes: int) -> None:
        rested = False
        while self._free() < nbytes:
            index = next((i for i, g in self._here.items() if not g.held), None)
            if index is not None:
                self._give_up(index)
            elif not rested:
                rested = True
                self._rest()
            else:
                held = sum(g.nbytes for g in self._here.values())
                raise CapacityError(
                    "host (gradients on their way)", nbytes, self._free(), self._free(), held,
                    'One operation uses gradients of more units than have room: set tierflow.gradients to "host" and give '
                    "tierflow.host_memory what that takes, or use them one after the other",
                )  # fmt: skip

    def _give_up(self, index: int) -> None:
        gradients = self._here[index]
        self._write(index)
        self._end_write(gradients)
        self._memory.drop(gradients.chunk)
        del self._here[index]

    def _write(self, index: int) -> None:
        """Starts writing what NVMe has not got."""
        gradients = self._here[index]
        for slot in gradients.watched.slots:
            slot.finish_transfer()
        if not gradients.held and gradients.changes() != gradients.stored and self._wanted(index):
            for slot in gradients.watched.slots:
                slot.note_stats()
            self._memory.write(gradients.chunk)
            gradients.stored = gradients.changes()

    def _end_write(self, gradients: _Gradients) -> None:
        try:
            self._memory.end_write(gradients.chunk)
        except BaseException:
            gradients.stored = -1  # what is in memory is all there is
            raise

    def _wanted(self, index: int) -> bool:
        return self._due(index) or not self._units[index].watched.idle()

    def close(self) -> None:
        """Lets go of the memory."""
        self._here.clear()
        self._units.clear()
        self._memory.close()
