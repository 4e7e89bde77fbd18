"""Memory for transfers on pages of a known size."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_HUGE = 2 << 20
#: Not in Python's mmap module before 3.13 on every platform; Linux's number.
_NOHUGEPAGE = getattr(mmap, "MADV_NOHUGEPAGE", 15)


class Pages:
    """``nbytes`` of private memory, filled with bytes that do not compress, on huge pages or on 4 KiB pages.

    ``got_huge``: the share of it that the kernel really put on huge pages, 0 to 1.
    """

    def __init__(self, nbytes: int, huge: bool):
        self.nbytes = -(-nbytes // _HUGE) * _HUGE
        self.huge = huge
        # one huge page more: where the kernel puts a mapping is not where a huge page begins
        self._map = mmap.mmap(-1, self.nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE if huge else _NOHUGEPAGE)
        self._map.madvise(mmap.MADV_DONTFORK)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._begin = -address % _HUGE
        self._address = address
        _fill(self._map, self._begin, self.nbytes)
        self.got_huge = _huge_bytes(address) / self.nbytes

    def pieces(self, nbytes: int) -> list[memoryview]:
        """As many pieces of ``nbytes`` as there is room for."""
        view = memoryview(self._map)
        return [view[self._begin + at :][:nbytes] for at in range(0, self.nbytes - nbytes + 1, nbytes)]


def _fill(memory: mmap.mmap, begin: int, nbytes: int) -> None:
    """Drives that compress or deduplicate would show figures that no training state reaches."""
    chunk = 1 << 20
    for at in range(begin, begin + nbytes, chunk):
        memory[at : at + chunk] = os.urandom(chunk)


def _huge_bytes(address: int, smaps: Path = Path("/proc/self/smaps")) -> int:
    """Bytes on huge pages of the mapping that holds ``address``; 0 where that cannot be told."""
    try:
        text = smaps.read_text()
    except OSError:
        return 0
    inside = False
    for line in text.splitlines():
        head = line.split(None, 1)[0]
        if "-" in head and not head.endswith(":"):
            low, _, high = head.partition("-")
            inside = int(low, 16) <= address < int(high, 16)
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0
