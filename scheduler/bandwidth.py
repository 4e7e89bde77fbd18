"""How fast the paths in use are here, measured once in two seconds (longer on a drive below 0.5 GB/s).

The probe writes only to an unnamed file of its own, which is gone when it ends, and holds at most twice PROBE_MEMORY
bytes of host memory (and half of that on an accelerator) outside the caps meanwhile.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tierflow import aio
from tierflow.cpu_adam import kernels, reference
from tierflow.cpu_adam.formats import StateFormat, resolve
from tierflow.cpu_adam.rules import ADAM, Hyper, Rule
from tierflow.scheduler.placement import Placement, format_of
from tierflow.scheduler.rates import NEVER, Bandwidths
from tierflow.scheduler.stager import DEVICE_ELEMENTS
from tierflow.scheduler.units import Unit
from tierflow.swap import IO_BYTES, Arena, Tier
from tierflow.swap.lanes import copy_pinned
from tierflow.swap.tickets import finish

#: Bytes of the probe's file, and of one transfer, and how many of these are under way at once.
FILE_BYTES = 256 << 20
TRANSFER_BYTES = 8 << 20
IN_FLIGHT = 4
#: More than caches hold, so that copies and kernels are measured from memory.
PROBE_MEMORY = 128 << 20
#: Seconds for each of the four drive phases (the first fills the file), and for each of the others.
DRIVE_SECONDS = 0.25
OTHER_SECONDS = 0.1
_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Paths:
    """What is in use: the compute ``device``, the store's folder (or several) and options, and what the kernels work on."""

    device: torch.device
    nvme_path: str | Sequence[str] | None = None
    aio_options: dict[str, Any] = field(default_factory=dict)
    format: StateFormat = field(default_factory=lambda: resolve("fp32", torch.float32))
    rule: Rule = ADAM
    grad_dtype: torch.dtype = torch.float32
    update_on_device: bool = False
    #: The drive's rates where they were measured before, by `tierflow tune`.
    drive: Bandwidths | None = None


def paths_of(
    units: list[Unit], placement: Placement, device: torch.device, nvme_path: str | Sequence[str] | None,
    aio_options: dict[str, Any], drive: Bandwidths | None = None,
) -> Paths:  # fmt: skip
    """The paths of a run. The kernels' format is the one that most of the trained elements have.

    ``drive``: the drive's rates, if they were measured before.
    """
    unit = max((u for u in units if u.trainable), key=lambda u: u.chunk.numel)
    return Paths(
        device, nvme_path, aio_options, format_of(unit, placement), placement.rule,
        placement.grad_dtype or unit.dtype, placement.optimizer is Tier.DEVICE, drive,
    )  # fmt: skip


def probe(paths: Paths) -> Bandwidths:
    """Measures every path. Raises OSError where the drive refuses."""
    arena = Arena(PROBE_MEMORY)
    try:
        memory = arena.bytes_at(0, arena.nbytes)
        memory.fill_(1)  # pages that were never touched would be made during the measurement
        drive = _drive(paths, memory) if paths.nvme_path is not None else (NEVER, NEVER, NEVER, NEVER)
        links = _copies(paths.device, memory)
    finally:
        del memory
        arena.close()
    return Bandwidths(*drive, *links, _update(paths), _intake(paths))


# ---- the drive


def _drive(paths: Paths, memory: torch.Tensor) -> tuple[float, float, float, float]:
    """(read, write, mixed read, mixed write) as known, or through a store like the one in use."""
    assert paths.nvme_path is not None
    if paths.drive is not None:
        return paths.drive.read, paths.drive.write, paths.drive.mixed_read, paths.drive.mixed_write
    folders = [paths.nvme_path] if isinstance(paths.nvme_path, str) else paths.nvme_path
    size = min(_file_bytes(folder) for folder in folders)
    with aio.open(folders, size, **paths.aio_options) as store:
        begin = store.allocate(size).offset
        step = min(TRANSFER_BYTES, size // 2)
        spots = [begin + at for at in range(0, size - step + 1, step)]
        pieces = [memory[at : at + step] for at in range(0, step * IN_FLIGHT, step)]
        # the first pass makes the file system's blocks ordinary ones; the others stay inside what it reached
        filled = spots[: max(len(_run(store, pieces, _once(spots, "write"))), 2)]
        write = _rate(_run(store, pieces, _over(filled, "write")), "write")
        read = _rate(_run(store, pieces, _over(filled, "read")), "read")
        half = len(filled) // 2
        mixed = _run(store, pieces, _alternate(_over(filled[:half], "read"), _over(filled[half:], "write")))
        return read, write, _rate(mixed, "read"), _rate(mixed, "write")


def _file_bytes(path: str) -> int:
    free = shutil.disk_usage(path).free
    size = min(FILE_BYTES, free // 2) // (2 * IO_BYTES) * (2 * IO_BYTES)
    if size == 0:
        raise aio.DiskFull(errno.ENOSPC, path, needed=4 * IO_BYTES, free=free)
    return size


def _once(spots: list[int], op: str) -> Iterator[tuple[str, int]]:
    yield from ((op, spot) for spot in spots)


def _over(spots: list[int], op: str) -> Iterator[tuple[str, int]]:
    while True:
        yield from _once(spots, op)


def _alternate(a: Iterator[tuple[str, int]], b: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    while True:
        yield next(a)
        yield next(b)


def _run(store: aio.Store, pieces: list[torch.Tensor], wanted: Iterator[tuple[str, int]]) -> list[aio.Ticket]:
    """Keeps as many transfers under way as there are pieces until the phase's time is over; at least one of each."""
    deadline = time.perf_counter() + DRIVE_SECONDS
    under_way: deque[aio.Ticket] = deque()
    ended: list[aio.Ticket] = []
    try:
        for number, (op, spot) in enumerate(wanted):
            if number >= len(pieces) and time.perf_counter() > deadline:
                break
            if len(under_way) == len(pieces):
                ended.append(under_way.popleft())
                finish(ended[-1])
            transfer = store.read if op == "read" else store.write
            under_way.append(transfer(pieces[number % len(pieces)], spot))
    finally:
        for ticket in under_way:
            finish(ticket)
    return ended + list(under_way)


def _rate(tickets: list[aio.Ticket], op: str) -> float:
    """Bytes per second of one direction, over the time in which the phase ran."""
    begin = min(t.began for t in tickets if t.began is not None)
    end = max(t.ended for t in tickets if t.ended is not None)
    return sum(t.nbytes for t in tickets if t.op == op) / (end - begin)


# ---- links and kernels


def _copies(device: torch.device, memory: torch.Tensor) -> tuple[float, float]:
    """(host to device, device to host); plain copies in memory without an accelerator."""
    half = memory.numel() // 2
    if device.type == "cpu":
        rate = _repeat(lambda: memory[:half].copy_(memory[half:]), half, device)
        return rate, rate
    from tierflow.scheduler.memory import register

    pinned, there = Arena(half), torch.empty(half, dtype=torch.uint8, device=device)
    register(pinned, device)
    here = pinned.bytes_at(0, half)
    try:
        up = _repeat(lambda: copy_pinned(there, here), half, device)
        return up, _repeat(lambda: copy_pinned(here, there), half, device)
    finally:
        torch.cuda.synchronize(device)
        pinned.close()


def _update(paths: Paths) -> float:
    """Elements per second of the update's kernel in the run's format."""
    device = paths.device if paths.update_on_device else torch.device("cpu")
    size = _ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS
    grad = torch.full((size,), 0.5, dtype=paths.grad_dtype, device=device)
    kinds = {k.name: torch.zeros(k.numel(size), dtype=k.dtype, device=device) for k in paths.format.kinds(paths.rule)}
    moments = {name: kinds[name] for name in paths.rule.moments}
    step: Callable[..., None] = kernels.rule_step if device.type == "cpu" else reference.rule_step

    def run() -> None:
        step(paths.rule, kinds["param"], grad, moments, hyper=Hyper(1, lr=1e-3, weight_decay=0.01),
             master=kinds.get("master"), scale=kinds.get("scale"))  # fmt: skip

    return _repeat(run, size, device)


def _intake(paths: Paths) -> float:
    """Bytes per second of gradients into the host's gradient memory."""
    grad = torch.full((_ELEMENTS,), 0.5, dtype=paths.format.param)
    memory = torch.zeros(_ELEMENTS, dtype=paths.grad_dtype)
    return _repeat(lambda: kernels.intake(memory, grad, accumulate=False), grad.nbytes, torch.device("cpu"))


def _repeat(run: Callable[[], object], amount: int, device: torch.device) -> float:
    """``amount`` per second, by the median of as many runs as the time allows (three at least)."""
    seconds: list[float] = []
    deadline = time.perf_counter() + OTHER_SECONDS
    run()
    while len(seconds) < 3 or time.perf_counter() < deadline:
        _synchronize(device)
        began = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return amount / sorted(seconds)[len(seconds) // 2]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
