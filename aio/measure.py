"""A short look at how fast each path is, for the weights of a store."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_REQUEST = 8 << 20
_IN_FLIGHT = 4


@dataclass(frozen=True)
class Speed:
    """Of one path, in bytes per second."""

    path: str
    read: float
    write: float

    @property
    def weight(self) -> float:
        """Bytes per second where as much is written as read: what a training step does."""
        return 2 / (1 / self.read + 1 / self.write)


def measure(
    paths: Sequence[str | os.PathLike[str]], *, seconds: float = 0.5, nbytes: int = 256 << 20, **options: Any
) -> list[Speed]:
    """Writes and reads an unnamed file in each directory, one directory after the other.

    Each direction takes ``seconds``, and at least once through its first requests. ``nbytes``: the file's size, and
    the most that is written outside the ``seconds``. ``options`` are ``tierflow.aio.open``'s. The page cache makes
    the figures of buffered paths meaningless, and a drive's own cache those of long writes: see ``tierflow tune``.
    Raises what ``open`` raises, and AioError.
    """
    return [_measure(os.fspath(path), seconds, max(nbytes, _REQUEST), options) for path in paths]


def _measure(path: str, seconds: float, nbytes: int, options: dict[str, Any]) -> Speed:
    from .opening import open

    request = min(_REQUEST, nbytes)
    buffers = [_memory(request) for _ in range(_IN_FLIGHT)]
    with open(path, nbytes, **options) as store:
        begin = store.allocate(nbytes).offset
        spots = [begin + at for at in range(0, nbytes - request + 1, request)]
        # Once first: only then are the file system's blocks ordinary ones. What a slow path does not reach in the
        # time is not read either.
        reached = spots[: max(_run(store.write, buffers, spots, seconds, once=True)[0], 1)]
        moved, took = _run(store.write, buffers, reached, seconds)
        write = moved * request / took
        moved, took = _run(store.read, buffers, reached, seconds)
        return Speed(path, moved * request / took, write)


def _run(transfer: Any, buffers: list[mmap.mmap], spots: list[int], seconds: float, once: bool = False) -> tuple[int, float]:
    """Keeps a transfer of each buffer under way until the time is over. Returns (transfers, seconds taken)."""
    began = time.perf_counter()
    under_way: list[Any] = []
    started = 0
    while (started < len(spots) or not once) and (not started or time.perf_counter() - began < seconds):
        if len(under_way) == len(buffers):
            under_way.pop(0).wait()
        under_way.append(transfer(buffers[started % len(buffers)], spots[started % len(spots)]))
        started += 1
    for ticket in under_way:
        ticket.wait()
    return started, time.perf_counter() - began


def _memory(nbytes: int) -> mmap.mmap:
    """Aligned, in huge pages where there are any, and not all zeros, which a drive may treat specially."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    pattern = os.urandom(1 << 16)
    for at in range(0, nbytes, len(pattern)):
        memory[at : at + len(pattern)] = pattern[: nbytes - at]
    return memory
