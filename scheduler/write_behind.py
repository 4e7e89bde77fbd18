"""Pieces of updates that were computed, on their way home.

[Note: writes that wait] A deferred update reads all states and weights behind one forward, whose length the drive then
decides; in the backward that follows the drive has little to do. So new states stay in staging memory as long as that has
room for what is to be read, and go to the drive behind the backward. Weights go at once: their copy is wanted by others.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from tierflow.scheduler.jobs import Piece
from tierflow.scheduler.stager import Stager
from tierflow.swap import Lane, Lease
from tierflow.swap.lanes import finish_all

#: Pieces that are being read, or have room to be, or are being written to have it: with fewer, writes begin. Enough for
#: reads to go on while a write of many blocks ends.
ROOM = 12
#: Writes under way while somebody waits for one.
AT_ONCE = 4


class WriteBehind:
    """``room``: how many pieces are being read or could be, None where nothing is left to read. ``weights_home``: called
    with a piece whose weights were written; ``ended``: with one that is all at home.
    """

    def __init__(
        self, stager: Stager, room: Callable[[], int | None], weights_home: Callable[[Piece], None],
        ended: Callable[[Piece], None],
    ):  # fmt: skip
        self._stager, self._room = stager, room
        self._weights_home, self._on_end = weights_home, ended
        self._pieces: deque[Piece] = deque()
        self._homing: deque[Piece] = deque()  # those of them whose weights are not written
        self._unsent: deque[Piece] = deque()  # those whose states' write has not begun

    def __iter__(self) -> Iterator[Piece]:
        return iter(list(self._pieces))

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, piece: Piece) -> None:
        """Takes over a piece whose kernel has run."""
        self._stager.write_weights(piece)
        self._pieces.append(piece)
        if piece.weights:
            self._homing.append(piece)
        # the step that takes an update tried before it counts on every write being under way; weights that were not
        # updated where they are used come up once all is home
        if piece.job.speculative or piece.job.tier is None:
            self._stager.write_states(piece)
        else:
            self._unsent.append(piece)

    def send(self) -> None:
        """Starts the writes whose memory is needed."""
        while self._unsent and self._wanted():
            self._stager.write_states(self._unsent.popleft())

    def _wanted(self) -> bool:
        room = self._room()
        return room is None or room + len(self._pieces) - len(self._unsent) < ROOM

    def retire(self) -> bool:
        """Ends what was written; False if nothing was."""
        done = False
        while self._homing and all(t.done() for t in self._homing[0].weights):
            self._weights_written(self._homing[0])
            done = True
        while self._pieces and self._written(self._pieces[0]):
            self._ended(self._pieces[0])
            done = True
        return done

    def _written(self, piece: Piece) -> bool:
        sent = not self._unsent or piece is not self._unsent[0]
        return sent and not piece.weights and all(t.done() for t in (*piece.writes, *piece.fills))

    def wait(self) -> None:
        """Until some weights are home or, if there are none, the oldest piece is."""
        if not self._homing:
            self._wait_for(self._pieces[0])
            return
        with self._waiting(self._homing[0]):
            self._weights_written(self._homing[0])

    def empty(self, inside: Callable[[Lease], bool]) -> None:
        """Ends the pieces whose staging memory is ``inside``."""
        for piece in self:
            if piece.scratch is not None and inside(piece.scratch):
                self._wait_for(piece)

    def _wait_for(self, piece: Piece) -> None:
        while self._unsent and (piece in self._unsent or len(self._pieces) - len(self._unsent) < AT_ONCE):
            self._stager.write_states(self._unsent.popleft())
        with self._waiting(piece):
            if piece in self._homing:
                self._weights_written(piece)
            self._ended(piece)

    @contextlib.contextmanager
    def _waiting(self, piece: Piece) -> Iterator[None]:
        manager, began = self._stager.manager, time.perf_counter()
        yield
        manager.traffic.wait_write += time.perf_counter() - began
        manager.timeline.wait(Lane.WRITE, f"{piece.job.unit.label} states", began)

    def _weights_written(self, piece: Piece) -> None:
        finish_all(piece.weights)
        self._homing.remove(piece)
        self._weights_home(piece)

    def _ended(self, piece: Piece) -> None:
        finish_all(piece.writes)
        finish_all(piece.fills)
        self._pieces.remove(piece)
        self._on_end(piece)

    def clear(self) -> None:
        """Forgets every piece; the caller has ended what is under way."""
        for queue in (self._pieces, self._homing, self._unsent):
            queue.clear()
