"""From paths and settings to a store: directories checked, engines started, files made."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from . import _aio, scratch, striping
from .errors import EngineUnavailable
from .extents import round_up
from .measure import measure
from .probe import explain, probe
from .store import EXTENT_GRANULARITY, Path, Store

EngineName = Literal["auto", "io_uring", "threads"]
Durability = Literal["none", "fdatasync"]
OnePath = str | os.PathLike[str]

DEFAULT_BLOCK_SIZE = 2 << 20
DEFAULT_QUEUE_DEPTH = 16
DEFAULT_THREADS = 8
_LARGEST_BLOCK = 1 << 30  # a single read or write moves at most 2 GiB less a page


@dataclass(frozen=True)
class _Settings:
    engine: EngineName
    block_size: int
    depths: list[int]  # one a path
    threads: int
    rings: int
    checksum: bool
    durability: Durability


def open(
    path: OnePath | Sequence[OnePath],
    capacity: int,
    *,
    engine: EngineName = "auto",
    block_size: int = DEFAULT_BLOCK_SIZE,
    queue_depth: int | Sequence[int] = DEFAULT_QUEUE_DEPTH,
    threads: int = DEFAULT_THREADS,
    rings: int = 1,
    weights: Sequence[float] | Literal["measure"] | None = None,
    stripe: int | None = None,
    checksum: bool = False,
    durability: Durability = "none",
) -> Store:
    """Makes a store of ``capacity`` bytes (rounded up) in the directory ``path``, gone with the process.

    Several paths make one store: stripes of ``stripe`` bytes (default: ``block_size``, so that one is one system
    call) are dealt out to them in proportion to ``weights``, one positive number a path, equal by default; "measure"
    takes those of ``aio.measure``, which writes to each path for a moment. Each path has its own engine and limit.

    ``block_size``: bytes moved by one system call (rounded up to 4096). ``queue_depth``: blocks that io_uring keeps
    in flight on a path, one number or one a path. ``rings``: io_uring instances a path, each with a thread and its
    part of the depth. ``threads``: of the thread-pool engine on each path, each with one block in flight.
    ``checksum``: keep a CRC32C of every 4096 bytes in memory (0.1% of what is written) and verify what is read.
    ``durability``: "none" for swap; "fdatasync" allows ``fsync`` and ``publish``.

    Raises FileNotFoundError, NotADirectoryError or PermissionError for a directory, DiskFull, ValueError
    for an argument out of range, and EngineUnavailable when ``engine="io_uring"`` cannot run here.
    """
    paths = _paths(path)
    check_range("capacity", capacity, 1, 1 << 62)
    check_range("block_size", block_size, 1, _LARGEST_BLOCK)
    check_range("threads", threads, 1, 1024)
    depths = _depths(queue_depth, len(paths))
    check_range("rings", rings, 1, min(64, *depths))
    _check_choice("engine", engine, ("auto", "io_uring", "threads"))
    _check_choice("durability", durability, ("none", "fdatasync"))
    block_size = round_up(block_size, EXTENT_GRANULARITY)
    if stripe is None:
        stripe = block_size
    check_range("stripe", stripe, EXTENT_GRANULARITY, 1 << 40)
    if stripe % EXTENT_GRANULARITY:
        raise ValueError(f"stripe is {stripe}: a multiple of {EXTENT_GRANULARITY} is needed")
    for one in paths:
        scratch.check_directory(one)
    settings = _Settings(engine, block_size, depths, threads, rings, bool(checksum), durability)
    return _open(paths, capacity, stripe, _turns(paths, weights, settings), settings)


def _open(paths: list[str], capacity: int, stripe: int, turns: list[int], settings: _Settings) -> Store:
    capacity = round_up(capacity, EXTENT_GRANULARITY)
    sizes = striping.file_sizes(capacity, stripe, turns, len(paths))
    refusals = ["" if settings.engine == "threads" else _refusal(one) for one in paths]
    if settings.engine == "io_uring" and any(refusals):
        # Before a file is made: a store that cannot be had should not first fill a disk.
        raise EngineUnavailable(errno.EOPNOTSUPP, next(filter(None, refusals)))
    with ExitStack() as undo:
        made = []
        for number, (one, size) in enumerate(zip(paths, sizes, strict=True)):
            made.append(_open_path(one, number, size, refusals[number], settings, undo))
        store = Store(made, capacity, stripe, turns, settings.durability)
        undo.pop_all()
    return store


def _open_path(
    path: str, number: int, size: int, refusal: str, settings: _Settings, undo: ExitStack
) -> Path:
    made = scratch.create(path, size, linkable=settings.durability == "fdatasync")
    checksummed = round_up(size, EXTENT_GRANULARITY) if settings.checksum else 0
    file = _aio.File(made.fd, made.alignment, made.memory_alignment, made.direct, checksummed)
    undo.callback(file.close)
    mover, engine, note = _start_engine(file, number, refusal, settings)
    undo.callback(mover.close)
    notes = " ".join(part for part in (made.note, note) if part) or None
    return Path(path, file, mover, engine, notes, made.alignment, made.memory_alignment, made.direct)


def _refusal(path: str) -> str:
    return scratch.refuses_uring(path) or ("" if _aio.BUILT_WITH_IO_URING else probe().reason)


def _start_engine(
    file: _aio.File, number: int, refusal: str, settings: _Settings
) -> tuple[_aio.Engine, str, str | None]:
    """Returns (engine, its name, why it is not io_uring although it could have been)."""
    if settings.engine != "threads" and not refusal:
        try:
            depth = settings.depths[number]
            return _aio.uring_engine(file, number, settings.block_size, depth, settings.rings), "io_uring", None
        except OSError as error:
            refusal = explain(error.errno or errno.EOPNOTSUPP)
            if settings.engine == "io_uring":
                raise EngineUnavailable(error.errno or errno.EOPNOTSUPP, refusal) from None
    mover = _aio.thread_engine(file, number, settings.block_size, settings.threads)
    return mover, "threads", f"{refusal} A pool of {settings.threads} threads is used." if refusal else None


def _turns(
    paths: list[str], weights: Sequence[float] | Literal["measure"] | None, settings: _Settings
) -> list[int]:
    if len(paths) == 1:
        return [0]
    if weights is None:
        return striping.pattern([1.0] * len(paths))
    if isinstance(weights, str):
        _check_choice("weights", weights, ("measure",))
        speeds = measure(paths, engine=settings.engine, block_size=settings.block_size, threads=settings.threads)
        weights = [speed.weight for speed in speeds]
    return striping.pattern(striping.check_weights(weights, len(paths)))


def _paths(path: OnePath | Sequence[OnePath]) -> list[str]:
    given = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not given:
        raise ValueError("path is empty: a store needs at least one directory")
    return [os.fspath(one) for one in given]


def _depths(queue_depth: int | Sequence[int], paths: int) -> list[int]:
    depths = list(queue_depth) if isinstance(queue_depth, Sequence) else [queue_depth] * paths
    if len(depths) != paths:
        raise ValueError(f"queue_depth has {len(depths)} entries and there are {paths} paths: one for each is needed")
    for depth in depths:
        check_range("queue_depth", depth, 1, 4096)
    return depths


def check_range(field: str, value: Any, least: int, most: int) -> None:
    """Raises TypeError unless ``value`` is an integer, ValueError unless it lies between the two (both possible)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} is {value!r}: an integer is needed")
    if not least <= value <= most:
        raise ValueError(f"{field} is {value}: between {least} and {most} is possible")


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{field} is {value!r}: one of {', '.join(map(repr, choices))}")
