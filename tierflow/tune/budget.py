"""What a run may spend: seconds, bytes written, disk space. Refusals carry the numbers."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, field

from tierflow import machine
from tierflow.sizes import format_size

#: A run without --sustained writes less than this.
MOST_WRITTEN = 20 * 10**9
#: Left free on every file system, beside a twentieth of it.
SPARE_BYTES = 1 << 30


class NotEnough(OSError):
    """Too little disk space or memory for a run. The message has the numbers and the remedy."""


@dataclass
class Budget:
    """``seconds`` from now on, and ``limit`` bytes to write at most."""

    seconds: float
    limit: int = MOST_WRITTEN
    written: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def bytes_left(self) -> int:
        return max(0, self.limit - self.written)

    @property
    def seconds_left(self) -> float:
        return self.seconds - self.elapsed

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began


def check_space(paths: list[str], needed: int, remedy: str) -> None:
    """Raises NotEnough unless every path has room for ``needed`` bytes; paths on one file system share its room."""
    by_device: dict[int, list[str]] = {}
    for path in paths:
        by_device.setdefault(os.stat(path).st_dev, []).append(path)
    for group in by_device.values():
        stat = os.statvfs(group[0])
        free = stat.f_bavail * stat.f_frsize
        spare = min(SPARE_BYTES + stat.f_blocks * stat.f_frsize // 20, free // 2)
        if needed * len(group) > free - spare:
            raise NotEnough(
                errno.ENOSPC,
                f"the files of this run need {format_size(needed * len(group))} and {format_size(free)} are free, of which "
                f"{format_size(spare)} stay free: {remedy}",
                ", ".join(group),
            )


def check_memory(needed: int) -> None:
    """Raises NotEnough unless ``needed`` bytes of buffers leave as much memory free again."""
    free = machine.mem_available()
    if 2 * needed > free:
        raise NotEnough(
            errno.ENOMEM,
            f"the buffers need {format_size(needed)} and {format_size(free)} of memory can be allocated: end other "
            "programs, or name fewer paths",
        )
