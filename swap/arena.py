"""One exact-size block of memory per tier; pools lease pieces of it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch

HUGE_PAGE = 2 << 20
#: Host memory is registered with an accelerator's driver in pieces that end at multiples of this address. One
#: transfer must not touch two registrations, so lanes cut their copies there.
REGISTER_BYTES = 1 << 30


class Arena:
    """``nbytes`` of host memory: anonymous, 2 MiB aligned, huge pages asked for, never copied by fork.

    Not ``tensor.pin_memory()``, which rounds up to powers of two. MADV_DONTFORK keeps a fork (data loader
    workers) from copying the tables, which took over a second per GiB and broke every huge page.
    """

    device = torch.device("cpu")

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self._pid = os.getpid()
        self._map: mmap.mmap | None = None
        self._before_close: list[Callable[[], object]] = []
        if nbytes == 0:
            return
        self._map = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._skip = -base % HUGE_PAGE
        self._address = base + self._skip
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                self._advise(getattr(mmap, advice))

    def _advise(self, advice: int) -> None:
        assert self._map is not None
        try:
            self._map.madvise(advice)
        except OSError:  # a kernel without transparent huge pages: smaller pages, the same bytes
            if advice != getattr(mmap, "MADV_HUGEPAGE", None):
                raise

    def bytes_at(self, offset: int, nbytes: int) -> torch.Tensor:
        """A uint8 tensor of ``nbytes`` at ``offset`` with a storage of its own (its use count is the lease's)."""
        assert self._map is not None and offset >= 0 and offset + nbytes <= self.nbytes
        start = self._skip + offset
        with torch.inference_mode(False):  # an inference tensor could never be refilled or trained on later
            return torch.frombuffer(memoryview(self._map)[start : start + nbytes], dtype=torch.uint8)

    def use_small_pages(self, offset: int, nbytes: int) -> None:
        """No huge pages there: what is small is given back by itself."""
        if self._map is not None and nbytes and hasattr(mmap, "MADV_NOHUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel that has no huge pages
                self._map.madvise(mmap.MADV_NOHUGEPAGE, self._skip + offset, nbytes)

    def discard(self, offset: int, nbytes: int) -> None:
        """Gives the pages there back to the kernel; they read as zeros until they are written again."""
        assert self._map is not None
        self._map.madvise(mmap.MADV_DONTNEED, self._skip + offset, nbytes)

    @property
    def address(self) -> int:
        """Address of byte 0."""
        return self._address if self._map is not None else 0

    def huge_page_bytes(self) -> int:
        """Bytes of the arena that the kernel really backs with huge pages, from smaps."""
        if self._map is None:
            return 0
        inside, total = False, 0
        with open("/proc/self/smaps") as smaps:
            for line in smaps:
                span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
                if span:
                    low, high = (int(x, 16) for x in span.groups())
                    inside = low < self._address + self.nbytes and high > self._address
                elif inside and line.startswith("AnonHugePages:"):
                    total += int(line.split()[1]) << 10
        return min(total, self.nbytes)

    def on_close(self, action: Callable[[], object]) -> None:
        """Runs ``action`` before the memory is given back, be it that nobody has the arena any more."""
        finalizer = weakref.finalize(self, _in_process, self._pid, action)
        finalizer.atexit = False  # all goes with the process
        self._before_close.append(finalizer)

    def close(self) -> None:
        """Gives the memory back at once. A tensor that outlives this reads zeros; it cannot crash."""
        if self._map is not None and os.getpid() == self._pid:
            while self._before_close:
                self._before_close.pop()()
            self._map.madvise(mmap.MADV_DONTNEED)
        self._map = None


def _in_process(pid: int, action: Callable[[], object]) -> None:
    """Not in a fork, which has no such memory."""
    if os.getpid() == pid:
        action()


class _ForeignMemory:
    """Device memory of an arena, dressed for ``torch.as_tensor`` so that each lease has its own storage."""

    def __init__(self, owner: torch.Tensor, offset: int, nbytes: int):
        self._owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (owner.data_ptr() + offset, False),
            "version": 2,
        }


class CudaArena:
    """``nbytes`` of an accelerator's memory, taken once: no cudaMalloc in the steady state."""

    def __init__(self, nbytes: int, device: torch.device):
        self.nbytes = nbytes
        self.device = device
        # zeros, as fresh host memory and a fresh store are: optimizer states start from what is there. The caching
        # allocator rounds blocks of this size to 2 MiB; the ledger counts what is leased
        with torch.inference_mode(False):
            self._base: torch.Tensor | None = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        if nbytes:  # every stream may use the arena from here on, and may still do so when it is dropped without close()
            torch.cuda.current_stream(device).synchronize()
            weakref.finalize(self, torch.cuda.synchronize, device).atexit = False

    def bytes_at(self, offset: int, nbytes: int) -> torch.Tensor:
        """A uint8 tensor of ``nbytes`` at ``offset`` with a storage of its own (its use count is the lease's)."""
        assert self._base is not None and offset >= 0 and offset + nbytes <= self.nbytes
        with torch.inference_mode(False):
            return torch.as_tensor(_ForeignMemory(self._base, offset, nbytes), device=self.device)

    def close(self) -> None:
        """Gives the memory back to torch's allocator and that to the driver, once nothing uses it any more."""
        if self._base is not None and self.nbytes:
            # streams that the allocator does not know of have worked on this block
            torch.cuda.synchronize(self.device)
            self._base = None
            torch.cuda.empty_cache()
        self._base = None
