"""Pieces of updates that are read before their turn, into staging memory that is idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tierflow.scheduler.jobs import Job, Piece
from tierflow.scheduler.stager import Stager
from tierflow.scheduler.units import Unit
from tierflow.swap import CapacityError, Chunk, Tier

#: Pieces of the step to come that are being read at once: the backward's weights wait behind them.
FORESEEN_AT_ONCE = 2


class ReadAhead:
    """``cut``: spans of a job's elements, a piece each; ``free``: bytes of HOST that may be taken."""

    def __init__(self, stager: Stager, cut: Callable[[Job, bool], list[tuple[int, int]]], free: Callable[[], int]):
        self._stager, self._cut, self._free = stager, cut, free
        self._pieces: dict[tuple[int, int, int], Piece] = {}  # by unit, begin, end
        self._to_come: Iterator[Piece] | None = None  # of the step to come, those not looked at; None before the first
        self.forgotten = 0  # bytes that were read for nothing

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Piece]:
        return iter(list(self._pieces.values()))

    def arriving(self) -> int:
        """How many pieces are being read."""
        return sum(not piece.arrived() for piece in self._pieces.values())

    def has(self, unit: Unit) -> bool:
        """Whether any piece of the unit is read."""
        return any(index == unit.index for index, _, _ in self._pieces)

    def read(self, job: Job) -> bool:
        """Starts reading what the job is to update; False if there is no room for all of it."""
        return all(self._start(Piece(job, *span)) for span in self._cut(job, False))

    def foresee(self, jobs: Callable[[], Iterator[Job]]) -> None:
        """Starts reading, a little at once, what jobs of the step to come may have to update, until there is no room."""
        if self._to_come is None:
            self._to_come = (Piece(job, *span) for job in jobs() for span in self._cut(job, True))
        while self.arriving() < FORESEEN_AT_ONCE:
            piece = next(self._to_come, None)
            if piece is None or not self._start(piece, borrow=False):  # it outlives the backward, idle memory does not
                self._to_come = iter(())
                return

    def step_came(self) -> None:
        """What is foreseen from now on is for another step."""
        self._to_come = None

    def _start(self, piece: Piece, borrow: bool = True) -> bool:
        """Starts reading, unless that was done; False if there is no room. ``borrow``: memory of idle gradients will do."""
        key = piece.job.unit.index, piece.begin, piece.end
        if key in self._pieces:
            return True
        need = self._stager.needs(piece)
        borrow = borrow and self._stager.idle.offers(need)
        if not borrow and self._free() < need:
            return False
        try:
            self._stager.read(piece, _nothing, wait=False, borrow=borrow)
        except CapacityError:
            return False
        self._pieces[key] = piece
        return True

    def take(self, job: Job, begin: int, end: int) -> Piece | None:
        """The piece, for the job that now computes it; None if it was not read."""
        piece = self._pieces.pop((job.unit.index, begin, end), None)
        if piece is not None:
            piece.job = job
        return piece

    def forget(self, unit: Unit | None) -> bool:
        """Gives back what was read (for one unit), once nothing writes there any more; False if nothing was."""
        if unit is None and self._to_come is not None:  # what is needed first is gone, and its memory wanted
            self._to_come = iter(())
        keys = [key for key in self._pieces if unit is None or key[0] == unit.index]
        for key in keys:
            piece = self._pieces.pop(key)
            self.forgotten += sum(piece.tensors[kind].nbytes for kind in piece.staged)
            self._stager.abandon(piece)
        return bool(keys)


def _nothing(_tier: Tier) -> tuple[Chunk, ...]:
    return ()
