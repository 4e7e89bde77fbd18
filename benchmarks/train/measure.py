"""What a process measures of itself: seconds by phase, bytes of the block device, resident memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Phases:
    """Seconds of one step by name; a name met again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: str | None = None
        self._since = 0.0

    def enter(self, name: str | None) -> None:
        """From now on seconds count for this phase, or for none."""
        now = time.perf_counter()
        if self._running is not None:
            self.seconds[self._running] = self.seconds.get(self._running, 0.0) + now - self._since
        self._running, self._since = {"update": "step"}.get(name or "", name), now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def kernel_io() -> tuple[int, int]:
    """(read, written) bytes that this process, all its threads included, has had from and to block devices."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found["read_bytes"]), int(found["write_bytes"])


def resident(pid: int | str = "self") -> int:
    """A process's resident bytes now; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def peak_resident() -> int:
    """This process's peak of resident bytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
