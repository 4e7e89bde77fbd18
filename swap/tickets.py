"""What stands for a transfer under way, and how it is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from tierflow.swap.timeline import Inline, Timed

#: Called with the index of a piece's first element and the piece in host memory.
Take = Callable[[int, torch.Tensor], None]


class Ticket(Protocol):
    """A transfer under way. It keeps its memory alive; ``wait`` raises what went wrong."""

    def done(self) -> bool:
        """Whether the transfer has ended, well or not."""
        ...

    def wait(self) -> None:
        """Blocks until the end; raises the transfer's error."""
        ...

    @property
    def times(self) -> Timed:
        """When bytes began to move and when the last was there. Holds none of the memory."""
        ...


class Done(Inline):
    """The ticket of a transfer that ended before it was returned."""

    def done(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    @property
    def times(self) -> Inline:
        """Its own."""
        return self


class Both:
    """Two transfers that make one; the times are the last's."""

    def __init__(self, first: Ticket, last: Ticket):
        self._first, self._last = first, last
        self.times = last.times

    def done(self) -> bool:
        """Whether both have ended."""
        return self._first.done() and self._last.done()

    def wait(self) -> None:
        """Blocks until the end of both; raises the first error."""
        finish_all([self._first, self._last])


def finish(ticket: Ticket) -> None:
    """Waits until the transfer no longer touches its memory; raises its error, or the interrupt that came meanwhile.

    Ctrl-C ends a wait and not the transfer: memory that is given back then would be written behind its next owner.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            ticket.wait()
            break
        except KeyboardInterrupt as caught:
            interrupt = caught
    if interrupt is not None:
        raise interrupt


def finish_all(tickets: list[Ticket]) -> None:
    """Finishes and drops every ticket, then raises the first error: no transfer is left running behind a failure."""
    error: BaseException | None = None
    for ticket in tickets:
        try:
            finish(ticket)
        except OSError as caught:
            error = error or caught
    tickets.clear()
    if error is not None:
        raise error
