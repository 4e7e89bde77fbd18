"""A store: one unnamed file, its extents, and the engine that moves bytes."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from typing import Any, Literal

from . import _aio, scratch
from .buffers import memory_of
from .errors import EngineUnavailable, StoreClosed
from .extents import Extent, ExtentAllocator, round_up
from .probe import explain, probe
from .ticket import Ticket

EngineName = Literal["auto", "io_uring", "threads"]

DEFAULT_BLOCK_SIZE = 2 << 20
DEFAULT_QUEUE_DEPTH = 16
DEFAULT_THREADS = 8
_EXTENT_GRANULARITY = 4096
_LARGEST_BLOCK = 1 << 30  # a single read or write moves at most 2 GiB less a page


def open(
    path: str | os.PathLike[str],
    capacity: int,
    *,
    engine: EngineName = "auto",
    block_size: int = DEFAULT_BLOCK_SIZE,
    queue_depth: int = DEFAULT_QUEUE_DEPTH,
    threads: int = DEFAULT_THREADS,
) -> Store:
    """Makes a store of ``capacity`` bytes (rounded up) in the directory ``path``, gone with the process.

    ``block_size``: bytes moved by one system call (rounded up to the alignment). ``queue_depth``: blocks that
    io_uring keeps in flight. ``threads``: of the thread-pool engine, each with one block in flight.

    Raises FileNotFoundError, NotADirectoryError or PermissionError for the directory, DiskFull, ValueError
    for an argument out of range, and EngineUnavailable when ``engine="io_uring"`` cannot run here.
    """
    _check_range("capacity", capacity, 1, 1 << 62)
    _check_range("block_size", block_size, 1, _LARGEST_BLOCK)
    _check_range("queue_depth", queue_depth, 1, 4096)
    _check_range("threads", threads, 1, 1024)
    if engine not in ("auto", "io_uring", "threads"):
        raise ValueError(f"engine is {engine!r}: one of 'auto', 'io_uring', 'threads'")
    path = os.fspath(path)
    scratch.check_directory(path)
    block_size = round_up(block_size, _EXTENT_GRANULARITY)
    # The engine first: a store that cannot be had should not first fill a disk.
    refusal = "" if engine == "threads" else scratch.refuses_uring(path)
    mover, name, note = _start_engine(engine, refusal, block_size, queue_depth, threads)
    try:
        return Store(path, capacity, mover, name, note)
    except BaseException:
        mover.close()
        raise


def _check_range(field: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} is {value!r}: an integer is needed")
    if not least <= value <= most:
        raise ValueError(f"{field} is {value}: between {least} and {most} is possible")


def _start_engine(
    engine: EngineName, refusal: str, block_size: int, queue_depth: int, threads: int
) -> tuple[_aio.Engine, str, str | None]:
    """Returns (engine, its name, why it is not io_uring although it could have been)."""
    if engine == "threads":
        return _aio.thread_engine(block_size, threads), "threads", None
    code = errno.EOPNOTSUPP
    if not refusal and not _aio.BUILT_WITH_IO_URING:
        refusal = probe().reason
    if not refusal:
        try:
            return _aio.uring_engine(block_size, queue_depth), "io_uring", None
        except OSError as error:
            code = error.errno or code
            refusal = explain(code)
    if engine == "io_uring":
        raise EngineUnavailable(code, refusal)
    note = f"{refusal} A pool of {threads} threads is used."
    return _aio.thread_engine(block_size, threads), "threads", note


class Store:
    """One unnamed file of fixed size and what moves bytes to and from it. Made by ``tierflow.aio.open``.

    Any thread may call it. Transfers under way at once are not ordered among each other: to read what is
    being written, wait for the write. Usable as a context manager; everything raises StoreClosed after
    ``close()`` (counters excepted) and in a forked child.

    ``path``: the directory. ``capacity``: bytes. ``alignment``: bytes that memory address, offset and length
    of each transfer must be multiples of. ``direct``: whether the page cache is bypassed. ``engine``:
    "io_uring" or "threads". ``note``: why I/O is buffered or io_uring is not used, for the caller to say
    once, or None.
    """

    def __init__(self, path: str, capacity: int, mover: _aio.Engine, engine: str, note: str | None) -> None:
        capacity = round_up(capacity, _EXTENT_GRANULARITY)
        made = scratch.create(path, capacity)
        self.path = path
        self.alignment = made.alignment
        self.direct = made.direct
        self.engine = engine
        self.note = " ".join(part for part in (made.note, note) if part) or None
        granularity = max(_EXTENT_GRANULARITY, made.alignment)
        self._extents = ExtentAllocator(capacity, granularity)
        self.capacity = self._extents.capacity
        self._lock = threading.Lock()
        self._under_way: dict[int, Ticket] = {}
        self._handles = _Handles(_aio.File(made.fd, made.alignment, made.direct), mover)
        # Also runs at exit, while everything that the transfers touch still exists.
        self._finalizer = weakref.finalize(self, _finish, self._handles, self._under_way)
        _open_handles.add(self._handles)

    def __repr__(self) -> str:
        state = "closed" if self._handles.closed else self.engine
        return f"<tierflow.aio.Store {self.path!r}, {self.capacity} bytes, {state}>"

    @property
    def allocated(self) -> int:
        """Bytes in live extents, rounding included."""
        with self._lock:
            return self._extents.allocated

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, those of transfers under way and of failed ones included."""
        return self._handles.mover.bytes_moved(False)

    @property
    def bytes_written(self) -> int:
        """Bytes written so far, those of transfers under way and of failed ones included."""
        return self._handles.mover.bytes_moved(True)

    @property
    def read_seconds(self) -> float:
        """Seconds during which at least one read was under way or queued."""
        return self._own().mover.busy_seconds(False)

    @property
    def write_seconds(self) -> float:
        """Seconds during which at least one write was under way or queued."""
        return self._own().mover.busy_seconds(True)

    def allocate(self, nbytes: int) -> Extent:
        """Takes an extent of at least ``nbytes`` bytes (rounded up to 4096 or the alignment, if larger).

        Raises OutOfSpace, ValueError unless ``nbytes`` is positive, StoreClosed.
        """
        self._open()
        with self._lock:
            return self._extents.allocate(nbytes)

    def free(self, extent: Extent) -> None:
        """Gives an extent back.

        Raises ValueError if it is not live, or a transfer on it is under way; StoreClosed.
        """
        self._open()
        with self._lock:
            for ticket in self._under_way.values():
                touches = ticket.offset < extent.end and extent.offset < ticket.offset + ticket.nbytes
                if touches and not ticket.done():
                    raise ValueError(f"{extent} cannot be freed: a {ticket!r} touches it")
            self._extents.free(extent)

    def read(self, buffer: Any, offset: int) -> Ticket:
        """Starts filling ``buffer`` from byte ``offset`` of the store. The ticket keeps the buffer alive.

        ``buffer``: anything with the buffer protocol, or with ``data_ptr()`` and ``nbytes`` (a contiguous
        tensor on the CPU). Raises ValueError naming what is misaligned, read-only, not contiguous or outside
        one live extent; TypeError; StoreClosed. What goes wrong later is raised by the ticket.
        """
        return self._start("read", buffer, offset)

    def write(self, buffer: Any, offset: int) -> Ticket:
        """Starts writing ``buffer`` at byte ``offset``; else as ``read``. Leave the bytes alone till done."""
        return self._start("write", buffer, offset)

    def close(self) -> None:
        """Waits for what is under way, then gives the disk space back. Again is allowed and does nothing."""
        self._finalizer()
        if self._handles.pid == os.getpid():
            # Another thread's close() may still be waiting: neither returns early.
            self._handles.mover.close()

    def __enter__(self) -> Store:
        self._open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self, op: str, buffer: Any, offset: int) -> Ticket:
        handles = self._open()
        memory = memory_of(buffer, writable=op == "read")
        self._check(memory.address, memory.nbytes, offset)
        with self._lock:
            if not self._extents.covers(offset, memory.nbytes):
                raise ValueError(
                    f"offset {offset} and length {memory.nbytes}: not inside one extent allocated here"
                )
            self._sweep()
            try:
                state = handles.mover.submit(
                    handles.file, op == "write", memory.address, offset, memory.nbytes
                )
            except OSError as error:
                raise StoreClosed(f"the store in {self.path} no longer takes transfers: {error}") from None
            ticket = Ticket(state, memory.owner, self.path, op=op, offset=offset, nbytes=memory.nbytes)
            self._under_way[id(ticket)] = ticket
        return ticket

    def _check(self, address: int, nbytes: int, offset: int) -> None:
        if nbytes == 0:
            raise ValueError("length is 0: there is nothing to transfer")
        for field, value in (("memory address", address), ("offset", offset), ("length", nbytes)):
            if value < 0 or value % self.alignment:
                raise ValueError(
                    f"{field} {value} is not a multiple of {self.alignment}, the alignment of {self.path}"
                )

    def _sweep(self) -> None:
        """Lets go of tickets that are done, and done() lets go of their buffers. With the lock held.

        Oldest first and no further than the first one under way: engines work nearly in order, and a look at
        every ticket on every call would make many small transfers quadratic.
        """
        while self._under_way:
            key, ticket = next(iter(self._under_way.items()))
            if not ticket.done():
                return
            del self._under_way[key]

    def _own(self) -> _Handles:
        if self._handles.pid != os.getpid():
            raise StoreClosed(
                f"the store in {self.path} belongs to the process that this one was forked from"
            )
        return self._handles

    def _open(self) -> _Handles:
        if self._own().closed:
            raise StoreClosed(f"the store in {self.path} is closed")
        return self._handles


class _Handles:
    """What has to be given back to the system, apart from the store so that a finalizer can hold it."""

    def __init__(self, file: _aio.File, mover: _aio.Engine) -> None:
        self.file = file
        self.mover = mover
        self.pid = os.getpid()
        self.closed = False


_open_handles: weakref.WeakSet[_Handles] = weakref.WeakSet()


def _finish(handles: _Handles, under_way: dict[int, Ticket]) -> None:
    handles.closed = True
    if handles.pid != os.getpid():
        return
    handles.mover.close()
    handles.file.close()
    for ticket in list(under_way.values()):
        ticket.done()
    under_way.clear()


def _after_fork() -> None:
    """The child keeps neither the disk space nor the ring of its parent, however long it lives."""
    for handles in list(_open_handles):
        handles.closed = True
        handles.file.close()
        handles.mover.abandon()


os.register_at_fork(after_in_child=_after_fork)
