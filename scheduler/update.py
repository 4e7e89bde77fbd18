"""The optimizer step as a pipeline: read -> kernel -> write, several pieces in flight.

A unit is cut into pieces of equal element ranges. Kinds that the kernel can address are updated in place;
the others are staged in host memory. Each kernel starts as soon as its piece's bytes are there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tierflow.cpu_adam import kernels, reference
from tierflow.scheduler.gradients import GradSlot
from tierflow.scheduler.rules import Rule
from tierflow.scheduler.units import Unit
from tierflow.swap import CapacityError, Chunk, Event, Kind, Lane, Lease, Manager, Ticket, Tier
from tierflow.swap.lanes import finish
from tierflow.swap.manager import Victims
from tierflow.swap.timeline import Inline

#: Elements that torch's operators update at a time on an accelerator: their fp64 intermediates are that long.
_DEVICE_ELEMENTS = 1 << 21

STATE_KINDS = (Kind.PARAM, Kind.MASTER, Kind.EXP_AVG, Kind.EXP_AVG_SQ)


@dataclass(frozen=True)
class Job:
    """One unit's update: per slot its gradient and rule, or None where there is nothing to do."""

    unit: Unit
    slots: list[tuple[GradSlot, Rule] | None]


@dataclass(eq=False)
class _Piece:
    """Elements [begin, end) of a unit: where each kind's bytes are, and what is under way for them."""

    job: Job
    begin: int
    end: int
    where: dict[Kind, Tier | None] = field(default_factory=dict)  # None: staged
    tensors: dict[Kind, torch.Tensor] = field(default_factory=dict)
    scratch: Lease | None = None
    tickets: list[Ticket] = field(default_factory=list)
    last: bool = False
    mirror: bool = False  # PARAM is updated in DEVICE, and its HOST copy is to follow


class UpdatePipeline:
    """Runs jobs through the kernels with at most ``depth`` pieces of ``piece_elements`` in flight.

    ``on_device``: whether kernels may work on DEVICE memory (always so without an accelerator).
    """

    def __init__(self, manager: Manager, piece_elements: int, depth: int, on_device: bool):
        self.manager, self.piece_elements, self.depth = manager, piece_elements, depth
        self._on_device = on_device
        self._timeline = manager.timeline

    def run(self, jobs: list[Job], victims: Victims) -> float:
        """Updates every unit of ``jobs``; returns the seconds spent in kernels.

        Raises what a transfer raised, after everything in flight has ended and the memory is given back.
        """
        self._kernel_seconds = 0.0
        reading: deque[_Piece] = deque()
        writing: deque[_Piece] = deque()
        try:
            for piece in self._pieces(jobs):
                while not self._begin(piece, victims, must=not (reading or writing)):
                    self._retire(reading, writing)
                reading.append(piece)
                while len(reading) + len(writing) >= self.depth:
                    self._retire(reading, writing)
            while reading or writing:
                self._retire(reading, writing)
        except BaseException:
            for piece in (*reading, *writing):
                self._abandon(piece)
            raise
        return self._kernel_seconds

    def _pieces(self, jobs: list[Job]) -> Iterator[_Piece]:
        for job in jobs:
            numel = job.unit.chunk.numel
            step = self.piece_elements if self._stages(job.unit) else numel
            spans = [(b, min(b + step, numel)) for b in range(0, numel, step)]
            spans = [s for s in spans if next(_segments(job, *s), None) is not None]
            for begin, end in spans:
                yield _Piece(job, begin, end, last=(begin, end) == spans[-1])

    def _stages(self, unit: Unit) -> bool:
        return any(self._addressable(unit.chunks[k]) is None for k in STATE_KINDS if k in unit.chunks)

    def _addressable(self, chunk: Chunk) -> Tier | None:
        """The tier whose copy the kernel can update in place, if any."""
        home = self.manager.home(chunk)
        # DEVICE first: that copy serves the next forward, and the host's room may go to the staging
        for tier in (Tier.DEVICE, Tier.HOST) if home is Tier.NVME else (home,):
            if (tier is Tier.HOST or self._on_device) and self.manager.ledger.valid(chunk, tier):
                return tier
        return None

    def _begin(self, piece: _Piece, victims: Victims, must: bool) -> bool:
        """Points the piece at memory and starts its reads; False if there is no room for it yet."""
        unit = piece.job.unit
        span = piece.end - piece.begin
        piece.where = {k: self._addressable(unit.chunks[k]) for k in STATE_KINDS if k in unit.chunks}
        for kind, tier in piece.where.items():
            if tier is not None:  # pinned first: room for the staging must not come from the piece itself
                self.manager.ledger.pin(unit.chunks[kind], tier)
        piece.mirror = piece.where[Kind.PARAM] is Tier.DEVICE and self.manager.ledger.valid(unit.chunk, Tier.HOST)
        if piece.mirror:
            self.manager.ledger.pin(unit.chunk, Tier.HOST)
        need = sum(unit.chunks[k].itemsize * span for k, tier in piece.where.items() if tier is None)
        try:
            piece.scratch = self.manager.scratch(Tier.HOST, need, victims) if need else None
        except CapacityError:
            self._release(piece)
            if not must:
                return False
            if self.manager.home(unit.chunk) is Tier.HOST or not self.manager.evictable(unit.chunk, Tier.HOST):
                raise
            # nothing is in flight, so the home has what this copy has: its room serves the staging
            self.manager.evict(unit.chunk, Tier.HOST)
            return self._begin(piece, victims, must)
        try:
            self._fill(piece)
        except BaseException:
            self._abandon(piece)
            raise
        return True

    def _fill(self, piece: _Piece) -> None:
        unit, offset = piece.job.unit, 0
        for kind, tier in piece.where.items():
            chunk = unit.chunks[kind]
            nbytes, at = chunk.itemsize * (piece.end - piece.begin), chunk.itemsize * piece.begin
            if tier is not None:
                piece.tensors[kind] = self._flat(unit, kind, tier)[piece.begin : piece.end]
                continue
            assert piece.scratch is not None
            data = piece.scratch.bytes()[offset : offset + nbytes]
            offset += nbytes
            piece.tensors[kind] = data.view(self._dtype(unit, kind))
            piece.tickets.append(self._stage_in(chunk, data, at))

    def _stage_in(self, chunk: Chunk, data: torch.Tensor, at: int) -> Ticket:
        if self.manager.home(chunk) is Tier.NVME:
            return self.manager.read(chunk, data, at)
        source = self.manager.memory(chunk, self.manager.home(chunk)).bytes()
        self.manager.traffic.to_host += data.nbytes
        ticket = self.manager.lane.drain(data, source[at : at + data.nbytes])
        self._timeline.follow(Lane.TO_HOST, self._timeline.name(chunk.id), ticket.times, data.nbytes)
        return ticket

    def _dtype(self, unit: Unit, kind: Kind) -> torch.dtype:
        if kind is Kind.MASTER:
            return torch.int16 if unit.chunks[kind].itemsize == 2 else torch.float32
        return unit.dtype if kind is Kind.PARAM else torch.float32

    def _flat(self, unit: Unit, kind: Kind, tier: Tier) -> torch.Tensor:
        chunk = unit.chunks[kind]
        return self.manager.memory(chunk, tier).bytes()[: chunk.nbytes].view(self._dtype(unit, kind))

    def _retire(self, reading: deque[_Piece], writing: deque[_Piece]) -> None:
        """Runs the oldest piece's kernel and starts its writes, or ends the oldest writes."""
        if reading and not (writing and writing[0].tickets and all(t.done() for t in writing[0].tickets)):
            piece = reading[0]
            began = time.perf_counter()
            _wait_all(piece.tickets)
            self.manager.traffic.wait_read += time.perf_counter() - began
            self._timeline.wait(Lane.READ, f"{piece.job.unit.label} states", began)
            self._compute(piece)
            reading.popleft()
            writing.append(piece)
            self._stage_out(piece)
            return
        piece = writing[0]
        began = time.perf_counter()
        _wait_all(piece.tickets)
        self.manager.traffic.wait_write += time.perf_counter() - began
        self._timeline.wait(Lane.WRITE, f"{piece.job.unit.label} states", began)
        writing.popleft()
        self._end(piece)

    def _compute(self, piece: _Piece) -> None:
        began, stamp = time.perf_counter(), self.manager.lane.stamp() if self._on_device else None
        for low, high, offset, grad, rule in _segments(piece.job, piece.begin, piece.end):
            part = {k: t[low - piece.begin : high - piece.begin] for k, t in piece.tensors.items()}
            memory = grad.memory.view(-1)[low - offset : high - offset]
            on_host = memory.device.type == "cpu"
            step = kernels.adam_step if on_host else reference.adam_step
            size = max(high - low, 1) if on_host else _DEVICE_ELEMENTS
            for at in range(0, high - low, size):
                here = {k: t[at : at + size] for k, t in part.items()}
                step(
                    here[Kind.PARAM], memory[at : at + size], here[Kind.EXP_AVG], here[Kind.EXP_AVG_SQ],
                    master=here.get(Kind.MASTER), step=rule.step, lr=rule.lr, beta1=rule.beta1, beta2=rule.beta2,
                    eps=rule.eps, weight_decay=rule.weight_decay, decoupled=rule.decoupled,
                    maximize=rule.maximize, unscale=rule.unscale, clip=rule.clip,
                )  # fmt: skip
        if piece.mirror:
            copy = self._flat(piece.job.unit, Kind.PARAM, Tier.HOST)
            copy[piece.begin : piece.end].copy_(piece.tensors[Kind.PARAM])
        self._kernel_seconds += time.perf_counter() - began
        work = Inline(began) if stamp is None else self.manager.lane.stretch(stamp)
        nbytes = sum(t.nbytes for t in piece.tensors.values())
        self._timeline.follow(Lane.UPDATE, f"{piece.job.unit.label} update", work, nbytes)

    def _stage_out(self, piece: _Piece) -> None:
        unit = piece.job.unit
        for kind, data in piece.tensors.items():
            chunk = unit.chunks[kind]
            at = chunk.itemsize * piece.begin
            if self.manager.home(chunk) is Tier.NVME:
                piece.tickets.append(self.manager.write(chunk, data.view(torch.uint8), at))
            elif piece.where[kind] is None:
                home = self.manager.memory(chunk, self.manager.home(chunk)).bytes()
                self.manager.traffic.to_device += data.nbytes
                ticket = self.manager.lane.fill(home[at : at + data.nbytes], data.view(torch.uint8))
                self._timeline.follow(Lane.TO_DEVICE, self._timeline.name(chunk.id), ticket.times, data.nbytes)
                piece.tickets.append(ticket)

    def _end(self, piece: _Piece) -> None:
        self._release(piece)
        if not piece.last:
            return
        chunk, manager = piece.job.unit.chunk, self.manager
        tier = piece.where[Kind.PARAM]
        home = manager.home(chunk)
        where = home if tier is None else tier
        if piece.mirror:
            manager.ledger.wrote(chunk, where)
        else:
            manager.wrote(chunk, where)
        for other in {home, *([Tier.HOST] if piece.mirror else [])} - {where}:  # written through
            manager.ledger.apply(chunk, other, Event.BEGIN_FILL)
            manager.ledger.apply(chunk, other, Event.END_FILL)

    def _release(self, piece: _Piece) -> None:
        for kind, tier in piece.where.items():
            if tier is not None:
                self.manager.ledger.unpin(piece.job.unit.chunks[kind], tier)
        if piece.mirror:
            self.manager.ledger.unpin(piece.job.unit.chunk, Tier.HOST)
        piece.tensors.clear()
        if piece.scratch is not None:
            self.manager.drop_scratch(Tier.HOST, piece.scratch)
            piece.scratch = None

    def _abandon(self, piece: _Piece) -> None:
        for ticket in piece.tickets:
            try:
                finish(ticket)
            except OSError:
                continue  # the first error is already on its way to the caller
        self._release(piece)


def _wait_all(tickets: list[Ticket]) -> None:
    """Waits for every ticket, then raises the first error: no transfer is left running behind a failure."""
    error: BaseException | None = None
    for ticket in tickets:
        try:
            finish(ticket)
        except OSError as caught:
            error = error or caught
    tickets.clear()
    if error is not None:
        raise error


def _segments(job: Job, begin: int, end: int) -> Iterator[tuple[int, int, int, GradSlot, Rule]]:
    """The parameters with a gradient that meet elements [begin, end): (low, high, slot offset, gradient, rule)."""
    for slot, entry in zip(job.unit.slots, job.slots, strict=True):
        low, high = max(begin, slot.offset), min(end, slot.offset + slot.numel)
        if entry is not None and low < high:
            yield low, high, slot.offset, entry[0], entry[1]
