"""A store: a range of bytes over one or several unnamed files, its extents, and the engines that move bytes."""

from __future__ import annotations

import operator
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import _aio, scratch
from .buffers import memory_of
from .errors import StoreClosed
from .extents import Extent, ExtentAllocator
from .ticket import Ticket

EXTENT_GRANULARITY = 4096


@dataclass(frozen=True)
class Path:
    """One directory of a store and what moves bytes to and from the file there.

    ``engine``: "io_uring" or "threads". ``alignment`` and ``memory_alignment`` in bytes, 1 where any will do.
    ``note``: why I/O is buffered or io_uring is not used, or None.
    """

    path: str
    file: _aio.File
    mover: _aio.Engine
    engine: str
    note: str | None
    alignment: int
    memory_alignment: int
    direct: bool

    @property
    def bytes_read(self) -> int:
        """Bytes read from here so far."""
        return self.mover.bytes_moved(False)

    @property
    def bytes_written(self) -> int:
        """Bytes written here so far."""
        return self.mover.bytes_moved(True)


class Store:
    """A range of bytes of fixed size, and what moves bytes to and from it. Made by ``tierflow.aio.open``.

    Any thread may call it. Transfers under way at once are not ordered among each other: to read what is being
    written, wait for the write, and the other way round. Transfers that share no byte never disturb each other,
    whatever their alignment. Usable as a context manager; everything raises StoreClosed after ``close()``
    (counters excepted) and in a forked child.

    ``paths``: one ``Path`` for each directory; ``path``: the first one's. ``capacity``, ``stripe``: bytes.
    ``alignment``: offsets and lengths that are multiples of it, at addresses that are multiples of
    ``memory_alignment``, go straight between buffer and device; others pass through aligned memory, which
    ``bounced_bytes`` counts. ``direct``: whether the page cache is bypassed on every path. ``engine``: "io_uring",
    "threads", or both names with a plus between. ``note``: why I/O is buffered or io_uring is not used, for the
    caller to say once, or None.
    """

    def __init__(
        self, paths: Sequence[Path], capacity: int, stripe: int, turns: Sequence[int], durability: str
    ) -> None:
        self.paths = tuple(paths)
        self.path = paths[0].path
        self.alignment = max(path.file.grain for path in paths)
        self.memory_alignment = max(path.memory_alignment for path in paths)
        self.direct = all(path.direct for path in paths)
        self.engine = "+".join(sorted({path.engine for path in paths}))
        self.note = " ".join(path.note for path in paths if path.note) or None
        self.stripe = stripe
        self.durability = durability
        self._extents = ExtentAllocator(capacity, max(EXTENT_GRANULARITY, self.alignment))
        self.capacity = self._extents.capacity
        self._names = [path.path for path in paths]
        self._lock = threading.Lock()
        self._under_way: dict[int, Ticket] = {}
        self._array = _aio.Array([path.mover for path in paths], stripe, list(turns))
        self._handles = _Handles(self.paths)
        # Also runs at exit, while everything that the transfers touch still exists.
        self._finalizer = weakref.finalize(self, _finish, self._handles, self._under_way)
        _open_handles.add(self._handles)

    def __repr__(self) -> str:
        state = "closed" if self._handles.closed else self.engine
        return f"<tierflow.aio.Store {', '.join(map(repr, self._names))}, {self.capacity} bytes, {state}>"

    @property
    def allocated(self) -> int:
        """Bytes in live extents, rounding included."""
        with self._lock:
            return self._extents.allocated

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, those of transfers under way and of failed ones included."""
        return self._array.bytes_moved(False)

    @property
    def bytes_written(self) -> int:
        """Bytes written so far, those of transfers under way and of failed ones included."""
        return self._array.bytes_moved(True)

    @property
    def bounced_bytes(self) -> int:
        """Bytes submitted so far that had to pass through aligned memory; of the callers' buffers."""
        return self._array.bytes_bounced()

    @property
    def read_seconds(self) -> float:
        """Seconds during which at least one read was under way or queued."""
        self._check_owner()
        return self._array.busy_seconds(False)

    @property
    def write_seconds(self) -> float:
        """Seconds during which at least one write was under way or queued."""
        self._check_owner()
        return self._array.busy_seconds(True)

    def allocate(self, nbytes: int) -> Extent:
        """Takes an extent of at least ``nbytes`` bytes (rounded up to 4096 or the alignment, if larger).

        Raises OutOfSpace, ValueError unless ``nbytes`` is positive, StoreClosed.
        """
        self._check_open()
        with self._lock:
            return self._extents.allocate(nbytes)

    def free(self, extent: Extent) -> None:
        """Gives an extent back.

        Raises ValueError if it is not live, or a transfer on it is under way; StoreClosed.
        """
        self._check_open()
        with self._lock:
            for ticket in self._under_way.values():
                if ticket.touches(extent.offset, extent.end) and not ticket.done():
                    raise ValueError(f"{extent} cannot be freed: a {ticket!r} touches it")
            self._extents.free(extent)

    def read(self, buffer: Any, offset: int, *, urgent: bool = True) -> Ticket:
        """Starts filling ``buffer`` from byte ``offset`` of the store. The ticket keeps the buffer alive.

        ``buffer``: anything with the buffer protocol, or with ``data_ptr()`` and ``nbytes`` (a contiguous
        tensor on the CPU). ``urgent``: goes before what is not; of that, one block goes for every 16 urgent ones.

        Raises ValueError naming what is read-only, not contiguous or outside one live extent; TypeError;
        StoreClosed. What goes wrong later is raised by the ticket.
        """
        return self._start("read", ((buffer, offset),), urgent)

    def write(self, buffer: Any, offset: int, *, urgent: bool = False) -> Ticket:
        """Starts writing ``buffer`` at byte ``offset``; else as ``read``. Leave the bytes alone till done."""
        return self._start("write", ((buffer, offset),), urgent)

    def readv(self, requests: Iterable[tuple[Any, int]], *, urgent: bool = True) -> Ticket:
        """Starts many reads, (buffer, offset) each, under one ticket; nothing starts if one is refused."""
        return self._start("read", requests, urgent)

    def writev(self, requests: Iterable[tuple[Any, int]], *, urgent: bool = False) -> Ticket:
        """Starts many writes, (buffer, offset) each, under one ticket; nothing starts if one is refused."""
        return self._start("write", requests, urgent)

    def fsync(self) -> Ticket:
        """Its ticket is done once every write submitted before is on the medium (fdatasync on each path).

        Writes submitted later reach the device after it. A write that failed is told by its own ticket alone.
        Raises ValueError unless the store has durability "fdatasync"; StoreClosed.
        """
        self._check_open()
        self._check_durable("fsync")
        with self._lock:
            return self._follow(Ticket(self._submitted("sync"), (), self._names, "fsync", ()))

    def publish(self, target: str | os.PathLike[str], nbytes: int | None = None) -> None:
        """Gives the store's file the name ``target``, cut to ``nbytes``, replacing what has that name in one step.

        Waits for what is under way and for the medium: a crash leaves the old file or the new one, whole. A write that
        failed is told by its own ticket alone: wait for those first. Close the store after it.

        Raises AioError if the medium refuses the sync, OSError for the name, ValueError for a store of several paths or
        without durability "fdatasync", StoreClosed.
        """
        self._check_durable("publish")
        if len(self.paths) > 1:
            raise ValueError(f"publish: a store of {len(self.paths)} paths is no one file")
        self.fsync().wait()
        length = self.capacity if nbytes is None else operator.index(nbytes)
        if not 0 <= length <= self.capacity:
            raise ValueError(f"nbytes is {length}: between 0 and {self.capacity}, the capacity, is possible")
        scratch.publish(self.paths[0].file.fd, self.path, os.fspath(target), length)

    def close(self) -> None:
        """Waits for what is under way, then gives the disk space back. Again is allowed and does nothing."""
        self._finalizer()
        if self._handles.pid == os.getpid():
            # Another thread's close() may still be waiting: neither returns early.
            for path in self.paths:
                path.mover.close()

    def __enter__(self) -> Store:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self, op: str, requests: Iterable[tuple[Any, int]], urgent: bool) -> Ticket:
        self._check_open()
        reading = op == "read"
        owners, ranges = [], []
        for buffer, offset in requests:
            address, nbytes, owner = memory_of(buffer, writable=reading)
            owners.append(owner)
            ranges.append((address, operator.index(offset), nbytes))
        if not ranges:
            raise ValueError("requests is empty: there is nothing to transfer")
        with self._lock:
            self._check_ranges(ranges)
            return self._follow(Ticket(self._submitted(op, ranges, urgent), owners, self._names, op, ranges))

    def _check_ranges(self, ranges: list[tuple[int, int, int]]) -> None:
        covers = self._extents.covers
        for _, offset, nbytes in ranges:
            if nbytes == 0:
                raise ValueError("length is 0: there is nothing to transfer")
            if not covers(offset, nbytes):
                raise ValueError(f"offset {offset} and length {nbytes}: not inside one extent allocated here")

    def _submitted(self, op: str, ranges: list[tuple[int, int, int]] | None = None, urgent: bool = False) -> _aio.Ticket:
        try:
            if ranges is None:
                return self._array.sync()
            return self._array.submit(op == "write", urgent, ranges)
        except OSError as error:
            raise StoreClosed(f"the store in {self.path} no longer takes transfers: {error}") from None

    def _follow(self, ticket: Ticket) -> Ticket:
        """Keeps the ticket, and so its buffers, until it is over. With the lock held.

        Those that are over go, oldest first and no further than the first one under way: engines work nearly in
        order, and a look at every ticket on every call would make many small transfers quadratic.
        """
        while self._under_way:
            key, oldest = next(iter(self._under_way.items()))
            if not oldest.done():
                break
            del self._under_way[key]
        self._under_way[id(ticket)] = ticket
        return ticket

    def _check_durable(self, what: str) -> None:
        if self.durability != "fdatasync":
            raise ValueError(
                f"{what}: the store was opened with durability {self.durability!r}, and nothing in it outlives the "
                "process; open it with durability='fdatasync'"
            )

    def _check_owner(self) -> None:
        if self._handles.pid != os.getpid():
            raise StoreClosed(
                f"the store in {self.path} belongs to the process that this one was forked from"
            )

    def _check_open(self) -> None:
        self._check_owner()
        if self._handles.closed:
            raise StoreClosed(f"the store in {self.path} is closed")


class _Handles:
    """What has to be given back to the system, apart from the store so that a finalizer can hold it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.pid = os.getpid()
        self.closed = False


_open_handles: weakref.WeakSet[_Handles] = weakref.WeakSet()


def _finish(handles: _Handles, under_way: dict[int, Ticket]) -> None:
    handles.closed = True
    if handles.pid != os.getpid():
        return
    for path in handles.paths:
        path.mover.close()
    for path in handles.paths:
        path.file.close()
    for ticket in list(under_way.values()):
        ticket.done()
    under_way.clear()


def _after_fork() -> None:
    """The child keeps neither the disk space nor the rings of its parent, however long it lives."""
    for handles in list(_open_handles):
        handles.closed = True
        for path in handles.paths:
            path.file.close()
            path.mover.abandon()


os.register_at_fork(after_in_child=_after_fork)
