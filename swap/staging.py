"""A ring of host memory through which transfers go in pieces."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from tierflow.swap.tickets import Take, Ticket, finish
from tierflow.swap.timeline import Timed


@dataclass(eq=False)
class _Staged:
    """A piece on its way through staging memory: bytes [begin, end) there, and who takes it."""

    begin: int
    end: int
    ticket: Ticket
    at: int
    piece: torch.Tensor
    take: Take
    taken: bool = False


class Staging:
    """A ring of host memory of fixed size; pieces leave it in the order in which they came."""

    def __init__(self, memory: torch.Tensor):
        self._memory = memory
        self._under_way: deque[_Staged] = deque()
        self._next = 0
        #: Several pieces fit, so that one is carried while another is taken.
        self.piece_bytes = memory.numel() // 4

    def place(self, nbytes: int) -> torch.Tensor:
        """Memory for the next piece; takes the oldest pieces first where there is no room."""
        size = -(-nbytes // 256) * 256
        while (begin := self._spot(size)) is None:
            self.take_oldest()
        self._next = begin + size
        self._begin = begin
        return self._memory[begin : begin + nbytes]

    def enter(self, ticket: Ticket, at: int, piece: torch.Tensor, take: Take) -> _Staged:
        """The piece that is on its way to what ``place`` gave last."""
        staged = _Staged(self._begin, self._next, ticket, at, piece, take)
        self._under_way.append(staged)
        return staged

    def _spot(self, size: int) -> int | None:
        if not self._under_way:
            return 0
        first = self._under_way[0].begin
        if self._next > first:  # used: [first, next)
            if self._next + size <= self._memory.numel():
                return self._next
            return 0 if size <= first else None
        return self._next if self._next + size <= first else None  # used: all but [next, first)

    def take_oldest(self) -> None:
        """Waits for the oldest piece and hands it over."""
        staged = self._under_way[0]
        finish(staged.ticket)
        self._under_way.popleft()
        staged.taken = True
        staged.take(staged.at, staged.piece)

    def take_arrived(self) -> None:
        """Hands over what is there by now."""
        while self._under_way and self._under_way[0].ticket.done():
            self.take_oldest()

    def drop(self) -> None:
        """Forgets what is under way; the caller has waited for it."""
        self._under_way.clear()


class _Both:
    """From the beginning of one transfer to the end of another."""

    def __init__(self, first: Timed, last: Timed):
        self._first, self._last = first, last

    @property
    def began(self) -> float | None:
        return self._first.began

    @property
    def ended(self) -> float | None:
        return self._last.ended


class StagedTicket:
    def __init__(self, staging: Staging, first: _Staged, last: _Staged):
        self._staging, self._last = staging, last
        self.times = _Both(first.ticket.times, last.ticket.times)

    def done(self) -> bool:
        self._staging.take_arrived()
        return self._last.taken

    def wait(self) -> None:
        while not self._last.taken:
            self._staging.take_oldest()
