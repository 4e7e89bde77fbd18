"""The updates that are due, in order of need, as a pipeline: read -> kernel -> write, several pieces in flight.

[Note: one copy of the weights] A unit that will be used soon is brought up whole, updated where it then is, and
written home behind that; so the update and the use that follows share one read. Its copy is held until the last
write has ended: until then the home is not whole. What is settled without a use to come (a checkpoint, the end) goes
through staging memory in pieces instead, and takes no room from what is cached.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from tierflow.scheduler.jobs import Job, Piece, foreseen, spans
from tierflow.scheduler.read_ahead import ReadAhead
from tierflow.scheduler.stager import Stager
from tierflow.scheduler.staging_room import StagingRoom
from tierflow.scheduler.units import Unit
from tierflow.scheduler.write_behind import WriteBehind
from tierflow.swap import CapacityError, Chunk, Lane, Lease, Tier
from tierflow.swap.manager import Victims
from tierflow.swap.tickets import finish_all

#: Victims whose next use is farther than that of the given unit; None: any.
VictimsBeyond = Callable[[Unit | None], Victims]

#: Pieces whose states are read before their weights have room: what keeps the drive busy. More would only stand before
#: reads that somebody waits for.
AHEAD_OF_WEIGHTS = 8


class UpdateQueue:
    """Jobs in order, in pieces of ``piece_elements``: ``depth`` of them in flight, and more in memory that nobody has.

    ``in_turn``: whether all weights that are used sooner than the unit's have come to DEVICE. ``landing``: bytes of HOST
    that are left to weights on their way up.

    After an exception the training state is inconsistent: ``abandon`` then ends what is under way.
    """

    def __init__(
        self, stager: Stager, piece_elements: int, depth: int, victims: VictimsBeyond,
        in_turn: Callable[[Unit], bool] = lambda unit: True, landing: int = 0,
    ):  # fmt: skip
        self.stager, self.piece_elements, self.depth = stager, piece_elements, depth
        self._in_turn = in_turn
        self._manager, self._victims = stager.manager, victims
        self._staging = StagingRoom(stager, piece_elements, landing)
        self._waiting: deque[Job] = deque()  # some piece was not begun
        self._jobs: dict[int, Job] = {}  # not ended, by unit
        self._reading: deque[Piece] = deque()
        self._computing: deque[Piece] = deque()
        self._writing = WriteBehind(stager, self._room_to_read, self._weights_written, self._ended)
        self._resting = False
        self._states_may_wait = False  # for their write, with memory to spare
        self.ahead = ReadAhead(stager, self._cut, self._staging.free)
        self._manager.on_lost = self._lost

    # ---- what is due

    def add(self, jobs: list[Job]) -> None:
        """Queues jobs in the order in which they are needed."""
        self.ahead.step_came()
        for job in jobs:
            self.end(job.unit)
            self._jobs[job.unit.index] = job
            self._waiting.append(job)

    def job(self, unit: Unit) -> Job | None:
        """The unit's job that has not ended."""
        return self._jobs.get(unit.index)

    def pending(self, unit: Unit) -> bool:
        """Whether the unit's weights are not yet those of the last step."""
        job = self._jobs.get(unit.index)
        return job is not None and not job.computed

    def may_fetch(self, unit: Unit) -> bool:
        """Whether a fetch of the unit brings what its next use is to see."""
        job = self._jobs.get(unit.index)
        return job is None or self._usable(job)

    def units(self) -> list[Unit]:
        """Units whose job has not ended."""
        return [job.unit for job in self._jobs.values()]

    def __bool__(self) -> bool:
        return bool(self._jobs)

    # ---- what will be due

    def foresee(self, units: Callable[[], Iterable[Unit]]) -> None:
        """Starts reading states of units whose update is to come, in this order, into staging memory that is idle.

        Of the step to come nothing is known yet but that it reads these bytes.
        """
        if not self._jobs:
            self.ahead.foresee(lambda: self._to_come(units()))

    def _to_come(self, units: Iterable[Unit]) -> Iterator[Job]:
        for unit in units:
            tier = self.stager.tier_of_use(unit)
            if tier is not None and self.stager.streams(unit) and not self.stager.spilled(unit):  # its gradient is to come
                yield foreseen(unit, tier)

    def _look_ahead(self) -> None:
        """Reads states of jobs whose weights have no room yet, so that the drive goes on meanwhile."""
        for job in self._waiting:
            tier = self.stager.tier_of_use(job.unit) if job.whole and not (job.begun or job.read_ahead) else None
            if tier is None or job.speculative:
                continue
            if len(self.ahead) >= AHEAD_OF_WEIGHTS or not self._room_for(job.unit, len(self.ahead)):
                return
            if self.stager.streams(job.unit) and not self.ahead.read(replace(job, tier=tier)):
                return
            job.read_ahead = True

    def forget(self, unit: Unit | None = None) -> bool:
        """Gives back what was read ahead (for one unit); False if nothing was."""
        for job in self._waiting:
            job.read_ahead = job.read_ahead and unit not in (None, job.unit)
        return self.ahead.forget(unit)

    def reclaim(self) -> bool:
        """Gives back staging memory, of what was read ahead or else of a piece that is written for it; False if there is none.

        True also where a piece has come one stage nearer to that.
        """
        return self.forget() or self._writing.end_oldest() or self._advance_oldest()

    def _advance_oldest(self) -> bool:
        """The oldest piece that is read or computed goes on to its write; False if there is none, or it lacks its weights."""
        if not self._computing and self._reading:
            self._wait_read(self._reading[0])
            if self._has_weights(self._reading[0].job):
                self._compute()
        if not self._computing:
            return False
        self._wait_kernel(self._computing[0])
        self._computed(self._computing[0])
        return True

    # ---- progress

    def advance(self, states_may_wait: bool = False) -> None:
        """Goes as far as it can without waiting. ``states_may_wait``: new ones, for their write, while memory is left."""
        self._states_may_wait = states_may_wait
        if not self._jobs:
            return
        progress = True
        while progress:
            progress = self._retire() or self._compute() or self._begin(must=False)
        if not self._resting:
            self._look_ahead()

    def finish(self, unit: Unit) -> None:
        """Until the unit's weights are those of the last step, and a fetch may read its home."""
        job = self._jobs.get(unit.index)
        if job is None or self._usable(job):
            return
        self._first(job)
        while not self._usable(job):
            self._step()

    def _usable(self, job: Job) -> bool:
        return job.ended if job.tier is None and self._manager.on_nvme(job.unit.chunk) else job.computed

    def end(self, unit: Unit) -> None:
        """Until the unit's update has reached its home."""
        self._states_may_wait = False
        job = self._jobs.get(unit.index)
        if job is not None:
            self._first(job)
            while not job.ended:
                self._step()

    def rest(self) -> None:
        """Until nothing is under way and nothing is held: somebody needs the memory."""
        self._resting, self._states_may_wait = True, False
        self.forget()
        try:
            while any(job.begun for job in self._jobs.values()):
                self._step()
        finally:
            self._resting = False

    def settle(self) -> None:
        """Until nothing is due and nothing is under way."""
        self._states_may_wait = False
        for job in self._waiting:
            if not job.begun:
                job.whole = False
        while self._jobs:
            self._step()
        self.forget()

    def abandon(self) -> None:
        """Ends what is under way, after an error: nothing writes to memory that is given back."""
        self.forget()
        for piece in (*self._reading, *self._computing, *self._writing):
            self.stager.abandon(piece)
        for queue in (self._reading, self._computing, self._writing, self._waiting):
            queue.clear()
        for job in self._jobs.values():
            self._let_go(job)
        self._jobs.clear()

    def vacate(self, unit: Unit) -> None:
        """Until nothing is in the memory of the unit's gradients, which is needed now."""
        self.stager.idle.take_back(unit, self._empty)

    def _empty(self, inside: Callable[[Lease], bool]) -> None:
        for piece in self.ahead:
            if piece.scratch is not None and inside(piece.scratch):
                self.forget(piece.job.unit)
        while any(p.scratch is not None and inside(p.scratch) for p in (*self._reading, *self._computing)):
            self._step()
        self._writing.empty(inside)

    def cancel(self, unit: Unit) -> bool:
        """Takes the unit's job out of the queue; False if it has begun, or there is none."""
        job = self._jobs.get(unit.index)
        if job is None or job.begun:
            return False
        self._waiting.remove(job)
        del self._jobs[unit.index]
        return True

    def any_victims(self) -> Victims:
        """What may be given up for something that is needed now."""
        return self._victims(None)

    def _first(self, job: Job) -> None:
        job.needed = True
        if job in self._waiting and self._waiting[0] is not job:
            self._waiting.remove(job)
            self._waiting.insert(int(self._waiting[0].begun), job)

    def _step(self) -> None:
        """Some progress, waiting for it if need be."""
        self._manager.fetches.pump()
        if self._retire() or self._compute() or self._begin(must=False):
            return
        if self._reading:
            self._wait_read(self._reading[0])
        elif self._computing:
            self._wait_kernel(self._computing[0])
        elif not self._begin(must=not self._writing):
            self._writing.wait()

    def _wait_read(self, piece: Piece) -> None:
        began = time.perf_counter()
        finish_all(piece.reads)
        self._manager.fetches.settle_chunk(piece.job.unit.chunk)
        self._manager.waited(Lane.READ, f"{piece.job.unit.label} states", began)

    def _wait_kernel(self, piece: Piece) -> None:
        began = time.perf_counter()
        assert piece.kernel is not None
        piece.kernel.result()
        self._manager.timeline.wait(Lane.UPDATE, f"{piece.job.unit.label} update", began)

    # ---- the stages of a piece

    def _begin(self, must: bool) -> bool:
        """Starts the next piece's reads; False if there is none, or no room for it yet."""
        if not self._waiting:
            return False
        job = self._waiting[0]
        if not job.begun:
            room = must or self.ahead.has(job.unit) or self._room_for(job.unit)
            if self._resting or not room or not self._begin_job(job, must):
                return False
        span = job.todo[0]
        ready = self.ahead.take(job, *span)
        if not (ready or must or self._room_for(job.unit)):
            return False
        piece = ready or Piece(job, *span)
        try:
            if not ready:
                self.stager.read(piece, self._displaces(job, must), wait=must)
        except CapacityError:
            if not must or job.tier is None or not job.held:
                if must:
                    raise
                return False
            self._stage_weights(job)
            return self._begin(must)
        piece.await_gradients()
        self._reading.append(piece)
        job.todo.pop(0)
        if not job.todo:
            self._waiting.popleft()
        return True

    def _room_for(self, unit: Unit, foreseen: int = 0) -> bool:
        """Whether one more piece of the unit may be staged: within the depth, in memory that nobody has while states wait
        for their write, or in memory that idles.
        """
        pieces = (*self._reading, *self._computing, *self._writing)
        if sum(not piece.borrowed for piece in pieces) + foreseen < self.depth:
            return True
        return self._staging.offers(unit, self._states_may_wait)

    def _room_to_read(self) -> int | None:
        """How many pieces are being read, or could be; None if that is no reason for anything to wait."""
        next_staged = next((job.unit for job in self._waiting if self._staging.most(job.unit)), None)
        if not self._states_may_wait or next_staged is None:
            return None
        reading = sum(not piece.arrived() for piece in self._reading) + self.ahead.arriving()
        return reading + self._staging.pieces(next_staged)

    def _displaces(self, job: Job, must: bool) -> Victims:
        """What gives its memory for the job's: copies that are used later than the unit, or any if it must go on.

        Also any for an update in the backward, whose unit is used last of all. If it waited for the forward, with which it
        would then compete, a copy that was kept would have spared one read of the weights and delayed all of its states.
        """
        return self._victims(None if must or job.speculative else job.unit)

    def _begin_job(self, job: Job, must: bool) -> bool:
        manager, chunk = self._manager, job.unit.chunk
        home = manager.home(chunk)
        there = self.stager.in_place(chunk)
        job.tier = there if there or not job.whole else self.stager.tier_of_use(job.unit)
        if job.tier is Tier.DEVICE and not (there or must or job.needed or self._in_turn(job.unit)):
            job.tier = None
            return False
        if job.tier is not None and home is Tier.NVME:
            victims = self._displaces(job, must or job.needed)
            try:
                job.held = manager.fetches.start(chunk, victims, hint=not must, target=job.tier, hold=True)
            except CapacityError:
                job.whole = False  # not even alone: in pieces, then
            if not job.held:
                job.tier = None
            if not job.held and job.whole:
                return False
        if job.tier is None or job.speculative:  # of no use here, and out of date once this has run
            self.forget(job.unit)
        job.cut = self._cut(job)
        job.divide(list(job.cut))
        job.begun = True
        return True

    def _cut(self, job: Job, every: bool = False) -> list[tuple[int, int]]:
        staged = job.speculative or self.stager.stages(job)
        return spans(job, self.piece_elements if staged else job.unit.chunk.numel, every)

    def _stage_weights(self, job: Job) -> None:
        """Nothing is in flight, so the home has what the held copy has: its room serves the staging."""
        manager, chunk = self._manager, job.unit.chunk
        manager.fetches.settle_chunk(chunk)
        manager.renew_home(chunk)
        tier = job.tier
        self._let_go(job)
        job.tier = None
        assert tier is not None
        if manager.evictable(chunk, tier):
            manager.evict(chunk, tier)
        at = job.todo[0][0]
        job.divide([span for span in self._cut(job) if span[0] >= at])

    def _compute(self) -> bool:
        """Runs the kernel of the oldest piece that was read; False if none is ready."""
        if not self._reading or not self._ready(self._reading[0]):
            return False
        piece = self._reading[0]
        finish_all(piece.reads)
        chunk, tier = piece.job.unit.chunk, piece.job.tier
        if tier is not None or not self._manager.on_nvme(chunk):
            home = self._manager.home(chunk)
            if tier in (None, home):  # a copy may still be read from there
                self._manager.fetches.settle_chunk(chunk)
            self._manager.wrote(chunk, tier or home)
        self.stager.compute(piece)
        self._computing.append(self._reading.popleft())
        return True

    def _ready(self, piece: Piece) -> bool:
        job, chunk = piece.job, piece.job.unit.chunk
        if job.tier is not None and not job.held and self._manager.home(chunk) is Tier.NVME:  # its fetch failed
            job.held = self._manager.fetches.start(chunk, self._victims(None), target=job.tier, hold=True)
        return self._has_weights(job) and piece.arrived()

    def _has_weights(self, job: Job) -> bool:
        return job.tier is None or self._manager.ledger.valid(job.unit.chunk, job.tier)

    def _retire(self) -> bool:
        """Starts the writes of what was computed and ends what was written; False if there is nothing to do."""
        done = False
        while self._computing and self._computing[0].kernel.done():  # type: ignore[union-attr]
            self._computed(self._computing[0])
            done = True
        while self._writing.retire():
            done = True
        self._writing.send()
        return done

    def _computed(self, piece: Piece) -> None:
        assert piece.kernel is not None
        piece.kernel.result()
        self.stager.let_gradients_go(piece)
        self._writing.add(piece)
        self._computing.popleft()
        job = piece.job
        for ticket in piece.fills:
            self._manager.lane.before_use(ticket)
        job.computing -= 1
        job.computed = job.computing == 0
        if job.computed and not job.speculative:  # that may be undone, and done again with the same gradient
            self.stager.idle.rest(job.unit)

    def _weights_written(self, piece: Piece) -> None:
        """Once a unit's weights are all at home its copy is free to go; the states may follow later."""
        job = piece.job
        job.unwritten -= 1
        if not job.unwritten and job.tier is not None and not job.speculative:
            self._manager.renew_home(job.unit.chunk)
            self._let_go(job)

    def _ended(self, piece: Piece) -> None:
        self.stager.release(piece)
        job, chunk = piece.job, piece.job.unit.chunk
        job.writing -= 1
        if not job.ended:
            return
        if job.tier is None and self._manager.on_nvme(chunk):
            self._manager.wrote(chunk, self._manager.home(chunk))
        else:
            self._manager.renew_home(chunk)
        self._let_go(job)
        del self._jobs[job.unit.index]
        self.forget(job.unit)  # a part of it that had no gradient

    def _lost(self, chunk: Chunk) -> None:
        job = self._jobs.get(chunk.unit)
        if job is not None:
            job.held = False

    def _let_go(self, job: Job) -> None:
        if job.held and job.tier is not None:
            self._manager.fetches.let_go(job.unit.chunk, job.tier)
        job.held = False
