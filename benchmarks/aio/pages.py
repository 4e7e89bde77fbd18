"""Memory of known pages: huge ones of each contender's own, or the very same scattered 4 KiB pages for everyone.

A request is cut wherever its pages do not lie beside each other in physical memory, so what 4 KiB pages give is a matter
of luck (on one virtual disk reads at 1.1 GB/s where no two neighbours touch, 2.1 where four do) that would be mistaken
for a difference between engines. Nothing here imports torch or tierflow.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import random
import struct

PAGE, HUGE = 4096, 2 << 20
#: Linux's numbers.
_POPULATE, _FIXED = 0x8000, 0x10


def own(nbytes: int) -> memoryview:
    """Fresh memory on huge pages, filled with bytes that do not compress."""
    made = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(made)) % HUGE
    content = os.urandom(1 << 20)
    for at in range(0, nbytes, len(content)):
        made[begin + at : begin + at + len(content)] = content
    return memoryview(made)[begin : begin + nbytes]


class Scattered:
    """``nbytes`` on 4 KiB pages taken in random order; ``path`` is where any process can map them."""

    def __init__(self, nbytes: int):
        self._fd = os.memfd_create("scattered")
        os.ftruncate(self._fd, nbytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        with mmap.mmap(self._fd, nbytes) as view:
            places = list(range(0, nbytes, PAGE))
            random.Random(0).shuffle(places)
            for at in places:
                view[at : at + PAGE] = os.urandom(PAGE)
        self.contiguous = contiguous(mapped(self.path))

    def close(self) -> None:
        """Gives the pages back once nobody maps them."""
        os.close(self._fd)


def mapped(path: str) -> memoryview:
    """The pages of a ``Scattered``."""
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | _POPULATE))


def put_in_place(path: str, offset: int, address: int, nbytes: int) -> None:
    """Puts pages of a ``Scattered``, from ``offset`` on, where a process has its own, which it loses. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED | _POPULATE
    with open(path, "r+b") as file:
        got = libc.mmap(address, nbytes, access, flags, file.fileno(), offset)
    if got != address:
        raise OSError(ctypes.get_errno(), f"mmap over {nbytes} bytes was refused")


def contiguous(memory: memoryview) -> int | None:
    """Bytes that lie beside each other in physical memory, on average; None without the right to know (root's)."""
    return contiguous_at(ctypes.addressof(ctypes.c_char.from_buffer(memory)), memory.nbytes)


def contiguous_at(address: int, nbytes: int) -> int | None:
    """The same by address."""
    count = nbytes // PAGE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(address // PAGE * 8)
        entries = struct.unpack(f"<{count}Q", file.read(count * 8))
    frames = [entry & ((1 << 55) - 1) for entry in entries]
    if not any(frames):
        return None
    breaks = sum(after != before + 1 for before, after in itertools.pairwise(frames))
    return nbytes // (breaks + 1)
