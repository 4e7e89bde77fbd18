"""Pieces of updates that were computed, on their way home.

[Note: writes that wait] A deferred update reads all states and weights behind one forward, whose length the drive then
decides; in the backward that follows the drive has little to do. So new states stay in staging memory as long as that has
room for what is to be read, and go to the drive behind the backward. Weights go at once: their copy is wanted by others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from tierflow.scheduler.jobs import Piece
from tierflow.scheduler.stager import Stager
from tierflow.swap import Kind, Lane, Lease
from tierflow.swap.tickets import finish_all

#: Pieces that are being read, or have room to be, or are being written to have it: with fewer, writes begin. Enough for
#: reads to go on while a write of many blocks ends.
ROOM = 12
#: Writes under way while somebody waits for one.
AT_ONCE = 4


class WriteBehind:
    """``room``: how many pieces are being read or could be, None where nothing is to wait. ``weights_home``: called with a
    piece whose weights were written; ``ended``: with one that is all at home.
    """

    def __init__(
        self, stager: Stager, room: Callable[[], int | None], weights_home: Callable[[Piece], None],
        ended: Callable[[Piece], None],
    ):  # fmt: skip
        self._stager, self._room = stager, room
        self._weights_home, self._on_end = weights_home, ended
        self._pieces: list[Piece] = []  # in the order in which they were computed

    def __iter__(self) -> Iterator[Piece]:
        return iter(list(self._pieces))

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, piece: Piece) -> None:
        """Takes over a piece whose kernel has run."""
        self._pieces.append(piece)
        self._stager.write_first(piece)
        if not self._may_wait(piece):
            self._send(piece)

    def _may_wait(self, piece: Piece) -> bool:
        """Whether the write of the piece's states can be late, and there is one."""
        job = piece.job
        if job.speculative:  # once the update counts, what is not under way would go to the wrong slot
            return False
        if job.tier is None and self._stager.manager.on_nvme(job.unit.chunk):  # whose use waits for the job's end
            return False
        return self._stager.streams(job.unit)

    def _send(self, piece: Piece) -> None:
        piece.sent = True
        self._stager.write_states(piece)

    def send(self) -> None:
        """Starts the writes whose memory is needed. Called behind ``retire``, so that what was sent is under way."""
        unsent = [piece for piece in self._pieces if not piece.sent]
        under_way = len(self._pieces) - len(unsent)
        for sent, piece in enumerate(unsent):
            room = self._room()
            if room is not None and room + under_way + sent >= ROOM:
                return
            self._send(piece)

    def retire(self) -> bool:
        """Ends what was written, in order; False if nothing was."""
        homing = next((p for p in self._pieces if p.weights), None)
        if homing is not None and all(t.done() for t in homing.weights):
            self._weights_written(homing)
            return True
        oldest = next((p for p in self._pieces if p.sent), None)
        if oldest is not None and not oldest.weights and all(t.done() for t in (*oldest.writes, *oldest.fills)):
            self._ended(oldest)
            return True
        return False

    def wait(self) -> None:
        """Until some weights are home or, if there are none, the oldest piece is."""
        homing = next((p for p in self._pieces if p.weights), None)
        if homing is None:
            self._wait_for(self._pieces[0])
            return
        began = time.perf_counter()
        self._weights_written(homing)
        self._waited(homing, began)

    def end_oldest(self) -> bool:
        """Gives the memory of one piece back, once it is written; False if there is none."""
        if self._pieces:
            self._wait_for(self._pieces[0])
            return True
        return False

    def empty(self, inside: Callable[[Lease], bool]) -> None:
        """Ends the pieces whose staging memory is ``inside``."""
        for piece in self:
            if piece.scratch is not None and inside(piece.scratch):
                self._wait_for(piece)

    def _wait_for(self, piece: Piece) -> None:
        for other in [p for p in self._pieces if not p.sent]:
            if piece.sent and sum(p.sent for p in self._pieces) >= AT_ONCE:
                break
            self._send(other)
        began = time.perf_counter()
        if piece.weights:
            self._weights_written(piece)
        self._ended(piece)
        self._waited(piece, began)

    def _waited(self, piece: Piece, began: float) -> None:
        self._stager.manager.waited(Lane.WRITE, f"{piece.job.unit.label} states", began)

    def _weights_written(self, piece: Piece) -> None:
        finish_all(piece.weights)
        piece.tensors.pop(Kind.PARAM, None)  # a view of it would keep the copy where it is
        self._weights_home(piece)

    def _ended(self, piece: Piece) -> None:
        finish_all(piece.writes)
        finish_all(piece.fills)
        self._pieces.remove(piece)
        self._on_end(piece)

    def clear(self) -> None:
        """Forgets every piece; the caller has ended what is under way."""
        self._pieces.clear()
