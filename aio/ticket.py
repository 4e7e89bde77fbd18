"""A transfer under way."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from . import _aio
from .errors import AioError, CorruptData

# Memory that the kernel may still write to although nobody will learn when it has: a ring was lost with it.
_never_freed: list[Any] = []


class Ticket:
    """One or many reads or writes, or an fsync, under way. Buffers are held until it is over, even if nobody holds
    the ticket.

    Made by ``Store.read``, ``write``, ``readv``, ``writev`` and ``fsync``. ``op``: "read", "write" or "fsync".
    ``nbytes`` is what was asked for in all, ``offset`` where the first range begins, both in bytes.
    """

    __slots__ = ("_buffers", "_paths", "_ranges", "_state", "nbytes", "op")

    def __init__(
        self,
        state: _aio.Ticket,
        buffers: Sequence[object],
        paths: Sequence[str],
        op: str,
        ranges: Sequence[tuple[int, int, int]],
    ) -> None:
        self._state = state
        self._buffers: Sequence[object] | None = buffers
        self._paths = paths
        self.op = op
        self._ranges = ranges  # (address, offset, length)
        self.nbytes = ranges[0][2] if len(ranges) == 1 else sum(length for _, _, length in ranges)

    def __repr__(self) -> str:
        state = "done" if self._state.done() else "under way"
        if self.op == "fsync":
            return f"<fsync, {state}>"
        what = f"at offset {self.offset}" if len(self._ranges) == 1 else f"in {len(self._ranges)} ranges"
        return f"<{self.op} of {self.nbytes} bytes {what}, {state}>"

    @property
    def offset(self) -> int:
        """Where the first range begins in the store, in bytes."""
        return self._ranges[0][1] if self._ranges else 0

    def touches(self, begin: int, end: int) -> bool:
        """Whether a range shares bytes with [begin, end) of the store."""
        return any(offset < end and begin < offset + length for _, offset, length in self._ranges)

    def done(self) -> bool:
        """Whether the transfer is over, well or badly. Never raises."""
        if not self._state.done():
            return False
        self._let_go()
        return True

    def wait(self) -> None:
        """Blocks until the transfer is over. Raises AioError if it failed, each time it is called; CorruptData
        where a checksum did not match.

        Other threads run meanwhile. Ctrl-C interrupts the wait and not the transfer.
        """
        code = self._state.wait()
        self._let_go()
        if code != 0:
            raise self._error(code)

    def _let_go(self) -> None:
        if self._buffers is not None and self._state.orphaned:
            _never_freed.append(self._buffers)
        self._buffers = None

    def _error(self, code: int) -> AioError:
        kind: type[AioError] = AioError
        reason = os.strerror(code) if code > 0 else ""
        if code == _aio.END_OF_FILE:
            code, reason = errno.EIO, "the file ends before it"
        elif code == _aio.CORRUPT:
            code, kind = errno.EBADMSG, CorruptData
            reason = "the checksum does not match: these are not the bytes that were written"
        state = self._state
        path = self._paths[state.failed_path]
        return kind(code, reason, path, op=self.op, offset=state.failed_offset, length=state.failed_length)

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
