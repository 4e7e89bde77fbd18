"""A transfer under way."""

from __future__ import annotations

import errno
import os

from . import _aio
from .errors import AioError


class Ticket:
    """A read or write under way. Its buffer is held until it is over, even if nobody holds the ticket.

    Made by ``Store.read`` and ``Store.write``. ``nbytes`` is what was asked for, in bytes.
    """

    __slots__ = ("_buffer", "_path", "_state", "nbytes", "offset", "op")

    def __init__(
        self, state: _aio.Ticket, buffer: object, path: str, *, op: str, offset: int, nbytes: int
    ) -> None:
        self._state = state
        self._buffer: object | None = buffer
        self._path = path
        self.op = op
        self.offset = offset
        self.nbytes = nbytes

    def __repr__(self) -> str:
        state = "done" if self._state.done() else "under way"
        return f"<{self.op} of {self.nbytes} bytes at offset {self.offset}, {state}>"

    def done(self) -> bool:
        """Whether the transfer is over, well or badly. Never raises."""
        if not self._state.done():
            return False
        self._buffer = None
        return True

    def wait(self) -> None:
        """Blocks until the transfer is over. Raises AioError if it failed, each time it is called.

        Other threads run meanwhile. Ctrl-C interrupts the wait and not the transfer.
        """
        code = self._state.wait()
        self._buffer = None
        if code == 0:
            return
        at_end = code == _aio.END_OF_FILE
        raise AioError(
            errno.EIO if at_end else code,
            "the file ends before it" if at_end else os.strerror(code),
            self._path,
            op=self.op,
            offset=self._state.failed_offset,
            length=self._state.failed_length,
        )

    @property
    def seconds(self) -> float:
        """From submission to the end, waiting in the queue included; 0.0 while under way."""
        return self._state.seconds

    @property
    def times(self) -> _aio.Ticket:
        """Has ``began`` and ``ended`` too, and nothing of the buffer."""
        return self._state

    @property
    def began(self) -> float | None:
        """When the first byte was asked of the kernel, in seconds of ``time.perf_counter()``; None in the queue."""
        return self._state.began

    @property
    def ended(self) -> float | None:
        """When the last byte was there, in seconds of ``time.perf_counter()``; None while under way."""
        return self._state.ended
