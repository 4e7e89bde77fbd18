"""One unit's update, cut into pieces that are read, computed and written independently."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from tierflow.scheduler.gradients import GradSlot
from tierflow.scheduler.param_step import ParamStep
from tierflow.scheduler.units import STATES, Slot, Unit
from tierflow.swap import Chunk, Kind, Lease, Ticket, Tier

Entry = tuple[GradSlot, ParamStep]


@dataclass(eq=False)
class Job:
    """One unit's update: per slot its gradient and step, or None where there is nothing to do."""

    unit: Unit
    entries: list[Entry | None]
    speculative: bool = False  # to the second slot; see speculation.py
    whole: bool = False  # the weights are wanted soon: brought up whole, and updated where they then are
    tier: Tier | None = None  # of the copy that is updated; None: in pieces, staged like the states or where their part lies
    needed: bool = False  # somebody waits for it
    begun: bool = False
    read_ahead: bool = False  # its states, before it has begun
    held: bool = False  # the weights' copy is pinned, or will be as soon as it is there
    cut: list[tuple[int, int]] = field(default_factory=list)  # spans of elements, a piece each
    todo: list[tuple[int, int]] = field(default_factory=list)  # those that no piece was made of yet
    computing: int = 0  # pieces whose kernel has not run
    writing: int = 0  # pieces that have not ended
    unwritten: int = 0  # pieces whose weights are not home
    computed: bool = False

    def divide(self, todo: list[tuple[int, int]]) -> None:
        """A piece is to be made of each of these spans."""
        self.todo = todo
        self.computing = self.writing = self.unwritten = len(todo)

    @property
    def ended(self) -> bool:
        """Whether everything is where it belongs."""
        return self.computed and not self.writing


def foreseen(unit: Unit, tier: Tier) -> Job:
    """Stands for the update of a unit that a later step will ask for; only its states are read."""
    return Job(unit, [None] * len(unit.slots), whole=True, tier=tier)


@dataclass(eq=False)
class Piece:
    """Elements [begin, end) of a unit: where each kind's bytes are, and what is under way for them."""

    job: Job
    begin: int
    end: int
    tensors: dict[Kind, torch.Tensor] = field(default_factory=dict)
    before: dict[Kind, torch.Tensor] = field(default_factory=dict)  # memory for what is to be overwritten
    staged: list[Kind] = field(default_factory=list)
    scratch: Lease | None = None
    borrowed: bool = False  # the scratch is memory of an idle gradient
    holds_gradients: bool = False  # of its unit, in memory, which live on NVMe
    reads: list[Ticket] = field(default_factory=list)
    kernel: Future[None] | None = None
    weights: list[Ticket] = field(default_factory=list)  # their write
    writes: list[Ticket] = field(default_factory=list)
    fills: list[Ticket] = field(default_factory=list)  # to a device, where the compute waits for them
    sent: bool = False  # the write of its states has begun, if they have one
    _arrived: bool = False

    def await_gradients(self) -> None:
        """What of its gradients is still on its way from the device is read like all else."""
        crossing = [grad.transfer for _, _, _, grad, _ in segments(self.job, self.begin, self.end)]
        self.reads += [ticket for ticket in crossing if ticket is not None]
        self._arrived = False

    def arrived(self) -> bool:
        """Whether all that was to be read is there."""
        self._arrived = self._arrived or all(ticket.done() for ticket in self.reads)
        return self._arrived


def segments(job: Job, begin: int, end: int) -> Iterator[tuple[int, int, Slot, GradSlot, ParamStep]]:
    """The parameters with a gradient that meet elements [begin, end): (low, high, slot, gradient, step)."""
    for slot, entry in zip(job.unit.slots, job.entries, strict=True):
        low, high = max(begin, slot.offset), min(end, slot.offset + slot.numel)
        if entry is not None and low < high:
            yield low, high, slot, entry[0], entry[1]


def spans(job: Job, step: int, every: bool = False) -> list[tuple[int, int]]:
    """Spans of at most ``step`` elements that hold anything to update, in order; none across a cut of the unit.

    ``every``: also those that hold nothing.
    """
    parts = pairwise([0, *job.unit.cuts, job.unit.chunk.numel])
    cut = [(b, min(b + step, end)) for begin, end in parts for b in range(begin, end, step)]
    return [span for span in cut if every or next(segments(job, *span), None) is not None]


def kinds(unit: Unit) -> dict[Kind, Chunk]:
    """What the update reads and writes of the unit as a whole, its gradient not included."""
    return {kind: unit.chunks[kind] for kind in (Kind.PARAM, *STATES) if kind in unit.chunks}
