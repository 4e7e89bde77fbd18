"""Carries one piece of an update: its bytes in, the kernel over them, its bytes out."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from tierflow.cpu_adam import reference
from tierflow.cpu_adam.rules import ADAM, Rule
from tierflow.cpu_adam.steps import Steps
from tierflow.scheduler.gradients import GradSlot
from tierflow.scheduler.idle import IdleGradients
from tierflow.scheduler.jobs import Job, Piece, kinds, segments
from tierflow.scheduler.placement import staged_kinds
from tierflow.scheduler.spill import SpilledGradients
from tierflow.scheduler.units import STATES, Slot, Unit
from tierflow.swap import Chunk, Kind, Lane, Manager, Ticket, Tier
from tierflow.swap.manager import Victims
from tierflow.swap.tickets import finish
from tierflow.swap.timeline import Inline

#: Elements that torch's operators update at a time on an accelerator: their fp64 intermediates are that long.
DEVICE_ELEMENTS = 1 << 21


class Stager:
    """Moves pieces; decides nothing.

    ``on_device``: whether the kernels can work on DEVICE memory (always so without an accelerator). ``worker``: kernels
    run on a thread of their own, so that the caller goes on giving work to the accelerator meanwhile. ``rule``: of the
    update. ``idle``: memory that serves for staging beside the working pool's. ``spilled``: gradients that live on NVMe.
    """

    def __init__(
        self, manager: Manager, on_device: bool, worker: bool, rule: Rule = ADAM, idle: IdleGradients | None = None,
        spilled: SpilledGradients | None = None,
    ):  # fmt: skip
        self.manager, self.on_device, self._rule, self._spilled = manager, on_device, rule, spilled
        self.idle = idle or IdleGradients()
        self.kernel_seconds = 0.0
        self._may_stage: dict[int, list[Chunk]] = {}  # by unit index, what may be in staging memory
        self._timeline = manager.timeline
        self._worker = ThreadPoolExecutor(1, "tierflow-update") if worker else None

    def in_place(self, chunk: Chunk) -> Tier | None:
        """The tier whose copy the kernel can update where it is, if any."""
        home = self.manager.home(chunk)
        # DEVICE first: that copy serves the next forward
        for tier in (Tier.DEVICE, Tier.HOST) if home is Tier.NVME else (home,):
            if (tier is Tier.HOST or self.on_device) and self.manager.ledger.valid(chunk, tier):
                return tier
        return None

    def tier_of_use(self, unit: Unit) -> Tier | None:
        """The tier of the copy that is updated on its way to its next use; None where that is done in pieces or parts."""
        there, chunk = self.in_place(unit.chunk), unit.chunk
        if there is not None or self.manager.home(chunk) is not Tier.NVME:
            return there
        if self.on_device:
            return Tier.DEVICE
        return None if self.manager.nvme.in_memory(chunk) else Tier.HOST

    def streams(self, unit: Unit) -> bool:
        """Whether the unit has states on NVMe."""
        return any(self.manager.home(chunk) is Tier.NVME for chunk in unit.states)

    def where(self, job: Job, begin: int) -> dict[Kind, Tier | None]:
        """Per kind: the tier in which its bytes from element ``begin`` on are updated in place, None where staged.

        GRAD is among them if it lives on NVMe.
        """
        unit = job.unit
        found: dict[Kind, Tier | None] = {Kind.PARAM: job.tier or self._of_part(unit.chunk, begin)}
        if self.spilled(unit):
            found[Kind.GRAD] = Tier.HOST if self._spilled.here(unit) else None  # type: ignore[union-attr]
        return found | {kind: self.in_place(unit.part(kind, begin)) for kind in STATES if kind in unit.chunks}

    def _of_part(self, chunk: Chunk, begin: int) -> Tier | None:
        """Of weights that are in memory in parts: the tier of the one with element ``begin``, if a kernel can update it there."""
        if not self.manager.nvme.in_memory(chunk):
            return None
        first = chunk.bytes_of(begin)
        tier = next(t for t, _ in self.manager.nvme.kept(chunk, first, first + 1))
        return tier if tier is Tier.HOST or self.on_device else None

    def spilled(self, unit: Unit) -> bool:
        """Whether the unit's gradients live on NVMe."""
        return self._spilled is not None and unit in self._spilled

    def stages(self, job: Job) -> bool:
        """Whether any part of the update is staged."""
        tiers = [tier for begin in (0, *job.unit.cuts) for tier in self.where(job, begin).values()]
        return None in tiers or self.spilled(job.unit)  # whose gradients may go from memory meanwhile

    def needs(self, piece: Piece) -> int:
        """Bytes of staging memory."""
        chunks, elements = piece.job.unit.chunks, piece.end - piece.begin
        staged = [k for k, tier in self.where(piece.job, piece.begin).items() if tier is None]
        return sum(chunks[k].bytes_of(elements) for k in (*staged, *self._kept(piece.job)))

    def most(self, unit: Unit, elements: int) -> int:
        """Bytes of staging memory that a piece of so many elements needs at most."""
        if unit.index not in self._may_stage:
            undoable = any(self.manager.nvme.has_spare(chunk) for chunk in unit.states)
            kinds = staged_kinds(
                unit, lambda kind: [t for p in unit.parts(kind) for t in self.manager.homes(p)], self.on_device, undoable
            )
            self._may_stage[unit.index] = [unit.chunks[kind] for kind in kinds]
        return sum(chunk.bytes_of(elements) for chunk in self._may_stage[unit.index])

    def _kept(self, job: Job) -> list[Kind]:
        """Kinds whose old values are in no other place while they are overwritten."""
        chunks = kinds(job.unit) if job.speculative else {}
        return [k for k, chunk in chunks.items() if self.manager.home(chunk) is not Tier.NVME]

    def read(self, piece: Piece, victims: Victims, wait: bool, borrow: bool = True) -> None:
        """Leases staging memory and starts the reads. Raises CapacityError, with nothing taken.

        ``borrow``: memory of idle gradients will do.
        """
        unit, offset = piece.job.unit, 0
        need = self.needs(piece)
        piece.scratch = self.idle.lease(need) if borrow else None
        piece.borrowed = piece.scratch is not None
        if need and not piece.borrowed:
            piece.scratch = self.manager.scratch(Tier.HOST, need, victims, wait)
        for kind, tier in self.where(piece.job, piece.begin).items():
            chunk = unit.part(kind, piece.begin)
            begin, end = piece.begin - chunk.begin, piece.end - chunk.begin
            if tier is not None:
                if kind is Kind.GRAD:
                    piece.tensors[kind] = _part(unit, kind, self._held_gradients(piece), begin, end)
                elif kind is not Kind.PARAM:
                    piece.tensors[kind] = _part(unit, kind, self.flat(unit, chunk, tier), begin, end)
                continue
            assert piece.scratch is not None
            nbytes, at = chunk.bytes_of(end - begin), chunk.bytes_of(begin)
            data = piece.scratch.bytes()[offset : offset + nbytes]
            offset += nbytes
            piece.tensors[kind] = data.view(unit.layouts[kind].dtype)
            piece.staged.append(kind)
            piece.reads.append(self._bring(chunk, data, at))
        for kind in self._kept(piece.job):
            assert piece.scratch is not None
            nbytes = unit.chunks[kind].bytes_of(piece.end - piece.begin)
            piece.before[kind] = piece.scratch.bytes()[offset : offset + nbytes].view(unit.layouts[kind].dtype)
            offset += nbytes

    def _held_gradients(self, piece: Piece) -> torch.Tensor:
        unit = piece.job.unit
        assert self._spilled is not None
        self._spilled.hold(unit.index)
        piece.holds_gradients = True
        return self._spilled.memory(unit).view(unit.layouts[Kind.GRAD].dtype)

    def _bring(self, chunk: Chunk, data: torch.Tensor, at: int) -> Ticket:
        home = self.manager.home(chunk)
        if home is Tier.NVME:
            return self.manager.nvme.read(chunk, data, at)
        source = self.manager.memory(chunk, home).bytes()
        ticket = self.manager.lane.drain(data, source[at : at + data.nbytes])
        self.manager.moves(Lane.TO_HOST, chunk, ticket, data.nbytes)
        return ticket

    def compute(self, piece: Piece) -> None:
        """Starts the kernel over the piece, whose bytes are there."""
        if Kind.PARAM not in piece.staged:
            piece.tensors[Kind.PARAM] = self._weights(piece)
        if self._worker is not None:
            piece.kernel = self._worker.submit(self._kernel, piece)
            return
        self._kernel(piece)
        piece.kernel = Future()
        piece.kernel.set_result(None)

    def _weights(self, piece: Piece) -> torch.Tensor:
        """The piece's weights where they are updated in place."""
        unit, tier = piece.job.unit, piece.job.tier
        if tier is not None:
            return self.flat(unit, unit.chunk, tier)[piece.begin : piece.end]
        (part,) = self.manager.at_home(unit.chunk, unit.chunk.bytes_of(piece.begin), unit.chunk.bytes_of(piece.end))
        return part.view(unit.dtype)

    def _kernel(self, piece: Piece) -> None:
        on_host = self._worker is not None or not self.on_device
        began, stamp = time.perf_counter(), None if on_host else self.manager.lane.stamp()
        for kind, before in piece.before.items():
            before.copy_(piece.tensors[kind])
        self._update_on_host(piece) if piece.tensors[Kind.PARAM].is_cpu else self._update_on_device(piece)
        self.kernel_seconds += time.perf_counter() - began
        work = Inline(began) if stamp is None else self.manager.lane.stretch(stamp)
        nbytes = sum(t.nbytes for t in piece.tensors.values())
        self._timeline.follow(Lane.UPDATE, f"{piece.job.unit.label} update", work, nbytes)

    def _update_on_host(self, piece: Piece) -> None:
        """All parameters of the piece in one call of the kernels.

        [Note: rounding by chance] The kernels draw for each element from a seed, the step and its place. Seed and place are
        the parameter's own, its number in the model and the element in it; so the bits do not depend on how the model is
        cut into units and these into pieces, which follows from the caps.
        """
        tensors = piece.tensors
        moments = {name: tensors[Kind(name)] for name in self._rule.moments}
        steps = Steps(self._rule, tensors[Kind.PARAM], moments, master=tensors.get(Kind.MASTER), scale=tensors.get(Kind.SCALE))
        for begin, end, slot, grad, step in segments(piece.job, piece.begin, piece.end):
            memory = _gradient(piece, begin, end, slot, grad)
            steps.add(
                begin - piece.begin, end - piece.begin, memory, hyper=step.hyper, maximize=step.maximize,
                unscale=step.unscale, clip=step.clip, seed=slot.order, index=begin - slot.offset,
            )  # fmt: skip
        steps.run()

    def _update_on_device(self, piece: Piece) -> None:
        unit = piece.job.unit
        for begin, end, slot, grad, step in segments(piece.job, piece.begin, piece.end):
            memory = _gradient(piece, begin, end, slot, grad)
            for low in range(begin, end, DEVICE_ELEMENTS):
                high = min(low + DEVICE_ELEMENTS, end)
                here = {k: _part(unit, k, t, low - piece.begin, high - piece.begin) for k, t in piece.tensors.items()}
                reference.rule_step(
                    self._rule, here[Kind.PARAM], memory[low - begin : high - begin],
                    {name: here[Kind(name)] for name in self._rule.moments}, hyper=step.hyper, master=here.get(Kind.MASTER),
                    scale=here.get(Kind.SCALE), maximize=step.maximize, unscale=step.unscale, clip=step.clip,
                    seed=slot.order, index=low - slot.offset,
                )  # fmt: skip

    def write_first(self, piece: Piece) -> None:
        """Starts writing the weights home, and states whose home is memory."""
        manager, job = self.manager, piece.job
        for kind, data in piece.tensors.items():
            chunk, at = self._place(piece, kind)
            home = manager.home(chunk)
            if home is Tier.NVME and kind is Kind.PARAM:
                if job.tier is None and kind not in piece.staged:  # they were updated where they live
                    continue
                # others' weights wait for the held copy's room
                write = manager.nvme.write(
                    chunk, data.view(torch.uint8), at, job.speculative, urgent=job.held, tier=job.tier or Tier.HOST
                )
                piece.weights.append(write)
            elif home is not Tier.NVME and kind in piece.staged:
                there = manager.memory(chunk, home).bytes()
                fill = manager.lane.fill(there[at : at + data.nbytes], data.view(torch.uint8))
                manager.moves(Lane.TO_DEVICE, chunk, fill, data.nbytes)
                piece.fills.append(fill)

    def write_states(self, piece: Piece) -> None:
        """Starts writing the states to NVMe; of an update that may be undone, also what was in memory before it."""
        spare = piece.job.speculative
        for kind, data in piece.tensors.items():
            chunk, at = self._place(piece, kind)
            if kind in piece.before:
                piece.writes.append(self.manager.nvme.write(chunk, piece.before[kind].view(torch.uint8), at, spare))
            elif kind is not Kind.PARAM and kind in piece.staged and self.manager.home(chunk) is Tier.NVME:
                piece.writes.append(self.manager.nvme.write(chunk, data.view(torch.uint8), at, spare))

    def _place(self, piece: Piece, kind: Kind) -> tuple[Chunk, int]:
        """The chunk that holds the piece's elements of a kind, and their first byte in it."""
        chunk = piece.job.unit.part(kind, piece.begin)
        return chunk, chunk.bytes_of(piece.begin - chunk.begin)

    def let_gradients_go(self, piece: Piece) -> None:
        """The kernel has run, or never will."""
        piece.tensors.pop(Kind.GRAD, None)
        if piece.holds_gradients and self._spilled is not None:
            self._spilled.let_go(piece.job.unit.index)
        piece.holds_gradients = False

    def abandon(self, piece: Piece) -> None:
        """Ends what is under way for the piece, whatever comes of it, and gives its memory back."""
        for ticket in (*piece.reads, *piece.weights, *piece.writes, *piece.fills):
            with contextlib.suppress(OSError):
                finish(ticket)
        if piece.kernel is not None:
            piece.kernel.exception()
        self.release(piece)

    def release(self, piece: Piece) -> None:
        """Gives the staging memory back; nothing of the piece is under way any more."""
        self.let_gradients_go(piece)
        piece.tensors.clear()
        piece.before.clear()
        if piece.scratch is not None and piece.borrowed:
            piece.scratch.release()
        elif piece.scratch is not None:
            self.manager.drop_scratch(Tier.HOST, piece.scratch)
        piece.scratch = None

    def restore(self, job: Job, kind: Kind, victims: Victims) -> None:
        """Brings the old values of a kind that lives in memory back from its second slot."""
        chunk, manager = job.unit.chunks[kind], self.manager
        home = manager.memory(chunk, manager.home(chunk)).bytes()
        for span in job.cut:
            begin, end = (chunk.bytes_of(n) for n in span)
            lease = manager.scratch(Tier.HOST, end - begin, victims)
            try:
                data = lease.bytes()[: end - begin]
                finish(manager.nvme.read(chunk, data, begin, spare=True))
                finish(manager.lane.fill(home[begin:end], data))
            finally:
                manager.drop_scratch(Tier.HOST, lease)
        manager.wrote(chunk, manager.home(chunk))

    def flat(self, unit: Unit, chunk: Chunk, tier: Tier) -> torch.Tensor:
        """What a chunk of the unit has in a memory tier, as a flat tensor."""
        return self.manager.memory(chunk, tier).bytes()[: chunk.nbytes].view(unit.layouts[chunk.kind].dtype)

    def close(self) -> None:
        """Ends the kernels' thread."""
        if self._worker is not None:
            self._worker.shutdown()


def _gradient(piece: Piece, begin: int, end: int, slot: Slot, grad: GradSlot) -> torch.Tensor:
    """That of elements [begin, end) of the piece's unit, which are one parameter's."""
    if Kind.GRAD in piece.tensors:
        return piece.tensors[Kind.GRAD][begin - piece.begin : end - piece.begin]
    memory = grad.memory.view(-1)
    return memory if end - begin == slot.numel else memory[begin - slot.offset : end - slot.offset]


def _part(unit: Unit, kind: Kind, values: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """What serves elements [begin, end) of ``values``; both at a group's beginning, or the second at the end of the last."""
    layout = unit.layouts[kind]
    return values[layout.numel(begin) : layout.numel(end)]
